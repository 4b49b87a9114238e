"""A phone's power is cut by a program of the lab host, as a list of words, and not too often."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.leases.ledger import JOURNAL, Ledger
from device_agents.power import PowerCycleFailed, cycle

DAY_S = 24 * 3600.0
TWICE = DeviceConfig("a", "android", power_cycle=("true",), power_cycles_per_day=2)
NOTE = (sys.executable, "-c", "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])")


def test_the_program_gets_its_words_and_no_shell_reads_them(tmp_path: Path) -> None:
    words = "2; touch hacked $(id) `id` 'x"
    config = DeviceConfig("pixel8", "android", power_cycle=(*NOTE, str(tmp_path / "got"), words))
    said = cycle(config, "SERIAL", "ann", "silent", Ledger(tmp_path), Deadline(30))
    assert (tmp_path / "got").read_text() == words
    assert said == f"power-cycled with {sys.executable}"
    assert not (tmp_path / "hacked").exists()


def test_so_often_a_day_and_each_device_for_itself(tmp_path: Path) -> None:
    def at(now: float, device: str = "A") -> str:
        return cycle(TWICE, device, "ann", "silent", Ledger(tmp_path, clock=lambda: now), Deadline(30))

    at(0.0)
    at(10.0)
    with pytest.raises(PowerCycleFailed, match="A was power-cycled 2 times within a day, its limit is 2"):
        at(20.0)
    at(20.0, device="B")
    at(DAY_S + 1.0)  # the first is a day ago
    with pytest.raises(PowerCycleFailed, match="its limit is 2"):
        at(DAY_S + 2.0)


def test_a_line_that_a_crash_cut_short_is_no_cycle(tmp_path: Path) -> None:
    cycle(TWICE, "A", "ann", "x", Ledger(tmp_path, clock=lambda: 5.0), Deadline(30))
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('{"at": 6.0, "when": "", "fact": {"kind": "restarted", "device": "A", "h')
    cycle(TWICE, "A", "ann", "silent", Ledger(tmp_path, clock=lambda: 10.0), Deadline(30))
    with pytest.raises(PowerCycleFailed, match="2 times"):
        cycle(TWICE, "A", "ann", "silent", Ledger(tmp_path, clock=lambda: 11.0), Deadline(30))


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
        cycle(
            DeviceConfig("a", "android", power_cycle=command),
            "A",
            "ann",
            "x",
            Ledger(tmp_path),
            Deadline(seconds),
        )
