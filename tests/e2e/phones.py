"""Virtual phones and adb servers that end with their test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.deadline import Deadline
from device_agents.virtual import VirtualPhone, VirtualPhoneUnavailable, load_profile
from device_agents.virtual.adb import PrivateAdbServer
from device_agents.virtual.profile import parse_abi
from device_agents.virtual.rootfs import default_cache, prepare
from tests.device_agents.virtual_support import MakePhone


@pytest.fixture(scope="module")
def cache() -> Path:
    """Kept between runs: the first phone of a machine is 11 MB of packages."""
    try:
        prepare("x86_64", default_cache(), Deadline(300))
    except VirtualPhoneUnavailable as reason:
        _unavailable(reason)
    return default_cache()


def _unavailable(reason: VirtualPhoneUnavailable) -> None:
    """Skipped with the reason, but never where the project itself is checked."""
    if os.environ.get("CI"):
        pytest.fail(str(reason))
    pytest.skip(str(reason))


# A server for each test: one that still tries to reach the dead phones of the tests before answers late.
@pytest.fixture
def server() -> Iterator[PrivateAdbServer]:
    with PrivateAdbServer() as started:
        yield started


@pytest.fixture
def phone(cache: Path, tmp_path: Path) -> Iterator[MakePhone]:
    """Starts a phone: ``phone(profile="pixel-8", abi="x86_64", name="phone")``; they end with the test."""
    with contextlib.ExitStack() as stack:

        def start(
            profile: str = "pixel-8", abi: str = "x86_64", name: str = "phone", storage: int = 0
        ) -> VirtualPhone:
            folder = tmp_path / "phones"
            made = VirtualPhone(name, load_profile(profile), parse_abi(abi), folder, cache, storage)
            stack.callback(made.stop)
            try:
                made.start(Deadline(300))
            except VirtualPhoneUnavailable as reason:
                _unavailable(reason)
            return made

        yield start
