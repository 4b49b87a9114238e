"""Where the parts of virtual phones come from; and why they may not come."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.deadline import Deadline
from device_agents.virtual import debian
from device_agents.virtual.debian import _codename, unpack_packages
from device_agents.virtual.errors import VirtualPhoneUnavailable


def test_without_apt_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VirtualPhoneUnavailable, match="sought apt-get, apt-config, dpkg-deb, found none"):
        unpack_packages(("adbd",), "android-platform-tools", tmp_path, Deadline(5))


def test_a_machine_without_a_codename_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = tmp_path / "os-release"
    monkeypatch.setattr(debian, "_OS_RELEASE", release)
    with pytest.raises(VirtualPhoneUnavailable, match="VERSION_CODENAME"):
        _codename()
    release.write_text('ID=debian\nVERSION_CODENAME="trixie"\n')
    assert _codename() == "trixie"
