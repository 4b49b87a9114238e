"""Whether bundles and virtual phones can be made here: each reason why not is told with what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from device_agents.bundle import Bundle, builder, debian, ready
from device_agents.bundle.lock import Package, load_lock
from device_agents.deadline import Deadline
from device_agents.errors import BundleError
from device_agents.virtual import possible, rootfs
from device_agents.virtual.errors import VirtualPhoneUnavailable
from tests.device_agents.adb_fixtures import make_bundle

ABI = rootfs.native_abi()


@pytest.mark.parametrize("call", ["unshare", "mount"])
def test_namespaces_that_are_not_allowed(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    refuse = f"""
import device_agents.virtual.namespaces as ns
def refuse(*words):
    raise PermissionError(1, "{call}: Operation not permitted")
ns.{call} = refuse
"""
    monkeypatch.setattr(possible, "_PROGRAM", refuse + possible._PROGRAM)
    found = possible.namespaces(Deadline(20))
    assert (found.state, found.found) == ("fix", f"not allowed: {call}: Operation not permitted")
    assert "kernel.unprivileged_userns_clone" in found.do


def test_a_look_at_namespaces_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(possible, "_PROGRAM", "import time; time.sleep(60)")
    assert possible.namespaces(Deadline(0.3)).state == "fix"


def test_parts_that_are_kept_need_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for ask in (True, False):
        assert possible.parts(ABI, tmp_path, ask, Deadline(5)).state == "fix"  # no apt
    rootfs._place(ABI, tmp_path).mkdir(parents=True)
    assert possible.parts(ABI, tmp_path, True, Deadline(5)).state == "ok"


@pytest.mark.parametrize(("ask", "state"), [(True, "fix"), (False, "note")])
def test_the_archive_is_asked_for_parts_that_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: bool, state: str
) -> None:
    def lacks(names: tuple[str, ...], backported: str, deadline: Deadline) -> None:
        raise VirtualPhoneUnavailable(f"this machine's archive lacks one of {names}")

    monkeypatch.setattr("device_agents.virtual.debian.require_offered", lacks)
    found = possible.parts(ABI, tmp_path, ask, Deadline(5))
    assert found.state == state
    assert ("lacks one of ('adbd'" in found.found) == ask


def test_a_phone_that_this_machine_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    found = possible.parts("x86_64", tmp_path, True, Deadline(5))
    assert (found.state, "this is riscv64" in found.found) == ("fix", True)


def test_a_bundle_that_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Bundle = make_bundle(tmp_path / "bundles" / "some")
    marker = builder._marker("x86_64", load_lock(), tmp_path)
    marker.parent.mkdir(parents=True)
    marker.write_text("some")
    monkeypatch.setenv("PATH", str(tmp_path))  # nor is apt needed
    found = ready.ready("x86_64", tmp_path, ask_archive=True, deadline=Deadline(20))
    assert (found.state, made.id[:16] in found.found) == ("ok", True)


def test_without_the_tools_no_bundle_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = ready.ready("arm64-v8a", tmp_path, ask_archive=False, deadline=Deadline(20))
    assert (found.state, "no apt-get, apt-config, dpkg-deb here" in found.found) == ("fix", True)


def _mirror(monkeypatch: pytest.MonkeyPatch, newer: str) -> None:
    """It has all that is pinned, and of one package another version."""

    def newest(architecture: str, names: tuple[str, ...], *_: object) -> tuple[Package, ...]:
        debs = {deb.name: deb for deb in load_lock().packages("arm64-v8a").debs}
        return tuple(
            Package(name, "99" if name == newer else debs[name].version, "a" * 64, 1) for name in names
        )

    monkeypatch.setattr(debian, "newest", newest)


def test_a_bundle_whose_packages_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _mirror(monkeypatch, newer="")
    assert ready.ready("arm64-v8a", tmp_path, ask_archive=True, deadline=Deadline(20)).state == "ok"


def test_a_pinned_version_that_is_gone_matters_unless_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _mirror(monkeypatch, newer="libc6")
    found = ready.ready("arm64-v8a", tmp_path, ask_archive=True, deadline=Deadline(20))
    assert found.state == "fix"
    assert "libc6" in found.found
    assert "--relock" in found.do
    (libc6,) = (deb for deb in load_lock().packages("arm64-v8a").debs if deb.name == "libc6")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / libc6.sha256).touch()
    assert ready.ready("arm64-v8a", tmp_path, ask_archive=True, deadline=Deadline(20)).state == "ok"


def test_a_mirror_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def newest(*_: object) -> None:
        raise BundleError("this machine's Debian mirrors did not give the packages")

    monkeypatch.setattr(debian, "newest", newest)
    assert ready.ready("arm64-v8a", tmp_path, ask_archive=True, deadline=Deadline(20)).state == "fix"
    assert ready.ready("arm64-v8a", tmp_path, ask_archive=False, deadline=Deadline(20)).state == "note"


def test_a_mirror_that_stalls_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    targets = "Repo-URI: http://mirror.example/debian/\\nRelease: bookworm\\n"
    program.write_text(f'#!/bin/sh\n[ "$1" = indextargets ] && printf "{targets}" || exec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    found = ready.ready("arm64-v8a", tmp_path, True, Deadline(2))
    assert (found.state, "killed after 2 s" in found.found) == ("fix", True)
