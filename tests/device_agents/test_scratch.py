"""Folders of dead processes are removed by whoever makes the next one, those of the living stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from device_agents import scratch


@pytest.fixture(scope="module")
def dead() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait(60)
    return process.pid


@pytest.mark.parametrize("prefix", scratch.PREFIXES)
def test_what_dead_processes_left_is_removed(prefix: str, dead: int, tmp_path: Path) -> None:
    stale, theirs = tmp_path / f"{prefix}{dead}-abc", tmp_path / f"{prefix}abc"
    alive = tmp_path / f"{prefix}{os.getppid()}-abc"
    for folder in (stale, theirs, alive):
        (folder / "inside").mkdir(parents=True)
    assert list(scratch.abandoned(tmp_path)) == [stale]
    with scratch.owned_folder(prefix, tmp_path) as mine:
        assert sorted(tmp_path.iterdir()) == sorted([theirs, alive, Path(mine)])
        assert list(scratch.abandoned(tmp_path)) == []


def test_a_command_line_tells_whose_process_it_is(dead: int) -> None:
    server = f"adb --one-device {scratch.ADB}{{}}-takes-no-usb-device server"
    assert scratch.is_of_the_dead(server.format(dead))
    assert not scratch.is_of_the_dead(server.format(os.getpid()))
    assert not scratch.is_of_the_dead("adb server")
