"""A phone's power is cut by a program of the lab host, as a list of words, and not too often."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.power import DAY_S, JOURNAL, PowerCycleFailed, cycle, cycle_device

NOTE = (sys.executable, "-c", "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])")


def test_the_program_gets_its_words_and_no_shell_reads_them(tmp_path: Path) -> None:
    words = "2; touch hacked $(id) `id` 'x"
    config = DeviceConfig("pixel8", "android", power_cycle=(*NOTE, str(tmp_path / "got"), words))
    said = cycle_device(config, "SERIAL", "silent", tmp_path, Deadline(30))
    assert (tmp_path / "got").read_text() == words
    assert said == f"power-cycled with {sys.executable}"
    assert not (tmp_path / "hacked").exists()


def test_so_often_a_day_and_each_device_for_itself(tmp_path: Path) -> None:
    def at(now: float, device: str = "A") -> str:
        return cycle(("true",), device, "silent", tmp_path, 2, Deadline(30), clock=lambda: now)

    at(0.0)
    at(10.0)
    with pytest.raises(PowerCycleFailed, match="A was power-cycled 2 times within a day, its limit is 2"):
        at(20.0)
    at(20.0, device="B")
    at(DAY_S + 1.0)  # the first is a day ago
    with pytest.raises(PowerCycleFailed, match="its limit is 2"):
        at(DAY_S + 2.0)


def test_a_line_that_a_crash_cut_short_is_no_cycle(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text('{"device": "A", "at": 5.0, "reason": "x"}\n{"device": "A", "a')
    cycle(("true",), "A", "silent", tmp_path, 2, Deadline(30), clock=lambda: 10.0)
    with pytest.raises(PowerCycleFailed, match="2 times"):
        cycle(("true",), "A", "silent", tmp_path, 2, Deadline(30), clock=lambda: 11.0)


@pytest.mark.parametrize(
    ("command", "seconds", "said"),
    [
        (("no-such-program-of-kvfarm",), 30.0, "sought the program no-such-program-of-kvfarm"),
        (("sh", "-c", "echo no hub; exit 3"), 30.0, "sh gave 3: no hub"),
        (("sleep", "300"), 0.2, r"sleep took over 0\.2 s and was ended"),
        ((), 30.0, "farm.toml names no power_cycle"),
    ],
)
def test_what_does_not_work_says_why(
    command: tuple[str, ...], seconds: float, said: str, tmp_path: Path
) -> None:
    with pytest.raises(PowerCycleFailed, match=said):
        cycle_device(DeviceConfig("a", "android", power_cycle=command), "A", "x", tmp_path, Deadline(seconds))
