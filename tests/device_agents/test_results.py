"""Measurements are kept on the lab host until they are stored: made once, delivered as often as asked."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from device_agents.api import Vitals
from device_agents.errors import RunnerDied
from device_agents.lab_agent import LabAgent
from device_agents.recording.record import Plan, Record
from device_agents.results import Kept, Key, ResultJournal
from kvengine.program import Measurement, Sample, Workload
from tests.device_agents.lab_agents import TWO, make_fake, open_session

KEY = Key("run/left/test#0", "artifact workload")


def a_kept(load_ms: float = 7.0, note: str = "") -> Kept:
    samples = (Sample(5.0, (1.0, float("nan")), (3, 4, 5)),)
    measurement = Measurement(samples, load_ms, 1 << 20, 64, {"CPUExecutionProvider": 3}, 2)
    return Kept(measurement, Record(note="not recorded: no"), Vitals(1.5, temperatures_c={"cpu": 40.0}), note)


class Counting:
    """Work that says how often it was done."""

    def __init__(self, found: Callable[[], Kept] = a_kept) -> None:
        self.times, self._found = 0, found

    def __call__(self) -> Kept:
        self.times += 1
        return self._found()


def test_what_is_kept_is_not_done_again_also_by_another_process(tmp_path: Path) -> None:
    work = Counting()
    first = ResultJournal(tmp_path).once(KEY, work)
    again = ResultJournal(tmp_path).once(KEY, work)
    assert work.times == 1
    assert (first.again, again.again) == (False, True)
    assert repr(again.measurement) == repr(first.measurement)
    assert (again.record, again.after) == (first.record, first.after)


def test_other_work_has_another_key(tmp_path: Path) -> None:
    journal, work = ResultJournal(tmp_path), Counting()
    for key in (KEY, Key(KEY.leg, "another artifact"), Key("another leg", KEY.part), None, None):
        journal.once(key, work)
    assert work.times == 5
    assert len(list(tmp_path.iterdir())) == 3, "without a key nothing is kept"


def test_the_same_at_the_same_time_is_done_once(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly() -> Kept:
        begun.set()
        assert go_on.wait(20)
        return a_kept()

    journal, work = ResultJournal(tmp_path), Counting(slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(journal.once, KEY, work)
        assert begun.wait(20)
        second = pool.submit(journal.once, KEY, work)
        go_on.set()
        assert [first.result(20).again, second.result(20).again] == [False, True]
    assert work.times == 1


def test_work_that_failed_is_done_again(tmp_path: Path) -> None:
    def fail() -> Kept:
        raise RunnerDied("killed")

    journal = ResultJournal(tmp_path)
    with pytest.raises(RunnerDied):
        journal.once(KEY, fail)
    assert not journal.once(KEY, a_kept).again


def test_what_is_acknowledged_is_forgotten_with_all_its_parts(tmp_path: Path) -> None:
    journal = ResultJournal(tmp_path)
    weighed = Key(KEY.leg, "weighed")
    for key in (KEY, weighed, Key("another leg", "timed")):
        journal.once(key, a_kept)
    journal.acknowledge(KEY.leg)
    journal.acknowledge(KEY.leg)
    assert (journal.get(KEY), journal.get(weighed)) == (None, None)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: text.replace(b"7.0", b'"a"')]
)
def test_what_is_damaged_is_measured_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    journal, work = ResultJournal(tmp_path), Counting()
    journal.once(KEY, work)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert not journal.once(KEY, work).again
    assert journal.once(KEY, work).again
    assert work.times == 2


def test_the_oldest_go_when_there_are_too_many(tmp_path: Path) -> None:
    journal = ResultJournal(tmp_path, limit_bytes=20_000)
    for number in range(20):
        journal.once(Key(str(number), ""), lambda: a_kept(note="x" * 2000))
        for age, path in enumerate(sorted(tmp_path.iterdir(), key=os.path.getmtime)):
            os.utime(path, (age, age))  # the disk's clock may be coarse
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    assert journal.get(Key("19", "")) is not None
    assert journal.get(Key("0", "")) is None


def test_a_disk_that_is_full_keeps_nothing_and_throws_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    journal = ResultJournal(tmp_path)
    assert not journal.once(KEY, a_kept).again
    assert list(tmp_path.iterdir()) == []


def test_an_agent_that_was_killed_after_measuring_has_the_result(tmp_path: Path) -> None:
    """The answer never arrived; the next agent, which shares the folder of leases, delivers it."""
    leases, workload = tmp_path / "leases", Workload((1,), 3, repeats=2)
    agent = LabAgent(tmp_path / "lab", TWO, leases=leases, make=make_fake, reap_every_s=None)
    token = agent.acquire("left", "me", 60).token
    session = open_session(agent, "left", token)
    found = agent.measure(session, token, workload, Plan(), KEY, "beside it")
    agent.shutdown()
    other = LabAgent(tmp_path / "lab-2", TWO, leases=leases, make=make_fake, reap_every_s=None)
    kept = other.kept(KEY)
    assert kept is not None
    assert (kept.measurement, kept.note, kept.again) == (found.measurement, "beside it", True)
    assert kept.after == found.after
    other.acknowledge(KEY.leg)
    assert other.kept(KEY) is None
    other.shutdown()


def test_a_repeated_call_is_answered_and_not_run_again(tmp_path: Path) -> None:
    agent = LabAgent(tmp_path / "lab", TWO, make=make_fake, reap_every_s=None)
    token = agent.acquire("left", "me", 60).token
    session = open_session(agent, "left", token)
    workload = Workload((1,), 3, repeats=2)
    assert not agent.measure(session, token, workload, Plan(), KEY).again
    agent.close_session(session, token)  # nothing is there that could run it
    assert agent.measure(session, token, workload, Plan(), KEY).again
    agent.shutdown()
