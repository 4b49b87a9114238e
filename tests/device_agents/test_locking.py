"""Processes take turns, the wait is told once and ends in time, and who gave up holds nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded
from device_agents.locking import lock_file, locked


def test_locked_takes_turns(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "x", Deadline(1)),
        pytest.raises(DeadlineExceeded, match=r"x: others kept it .* `lsof"),
        locked(tmp_path / "x", Deadline(0)),
    ):
        pass
    with locked(tmp_path / "x", Deadline(0)):
        pass


def test_sharers_wait_only_for_who_has_it_alone(tmp_path: Path) -> None:
    told: list[str] = []
    first, second = (lock_file(tmp_path / "x", Deadline(0), shared=True) for _ in range(2))
    with pytest.raises(DeadlineExceeded):
        lock_file(tmp_path / "x", Deadline(0.1), on_wait=lambda: told.append("waits"), poll_s=0.01)
    assert told == ["waits"]
    os.close(first)
    os.close(second)
    with locked(tmp_path / "x", Deadline(0)):
        pass
