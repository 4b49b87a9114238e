"""Devices of a run work at the same time, each in a worker process: nothing is lost, nothing doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from device_agents.deadline import Deadline
from harness.store import open_store
from reports.results import RunResults

ROOT = Path(__file__).parents[2]
SECONDS = 120
FARM = "".join(f"[devices.{name}]\n" for name in "ab")
# No reference is needed: what is compared is the device with itself.
SUITE = """
import os, signal, time
import pytest
from hypothesis import strategies as st
from harness import programs

def test_one(cell):
    "First"
    cell.for_all(programs.any_sequence(cell.limits), cell.run)

def test_two(cell):
    "Second"
    {second}
    cell.for_all(programs.any_sequence(cell.limits), cell.run)

@pytest.mark.hybrid_only
def test_never(cell):
    "There is no hybrid recipe"

def test_three(cell):
    "Third"
    cell.for_all(programs.any_sequence(cell.limits, greedy=False), cell.run)
"""
MEASURED = """
def test_measured(leg):
    leg()
"""


class Spread:
    """A folder with a checkpoint, a suite and a farm of two fake devices, in which pytest is run."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self._checkpoint = folder, checkpoint
        (folder / "farm.toml").write_text(FARM)
        self.suite()

    def suite(self, second: str = "pass", more: str = "") -> None:
        (self.folder / "test_suite.py").write_text(SUITE.format(second=second) + more)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pytest", "-p", "tests.harness.fake_farm", "test_suite.py"]
        command += [f"--model={self._checkpoint}", "--recipes=static", "--examples=3", "--kvfarm-seed=7"]
        command += ["--prompt=8", "--new-tokens=4", "--repeats=2", "--report=report", "--recover-within=5"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        return subprocess.Popen(
            [*command, *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"PYTHONPATH": str(ROOT), "FAKE_FARM": str(self.folder / "fake")},
        )

    def pytest(self, *arguments: str) -> tuple[int, str]:
        with self.start(*arguments) as process:
            output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output

    @property
    def stored(self) -> RunResults:
        with open_store(self.folder / ".kvfarm" / "results.db") as store:
            return store.results(store.latest())

    @property
    def log(self) -> list[dict[str, Any]]:
        path = self.folder / "fake" / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def leases(self) -> list[Path]:
        return list((self.folder / "fake").glob("*.lease"))


@pytest.fixture
def spread(tmp_path: Path, tiny_checkpoint: Path) -> Spread:
    return Spread(tmp_path, tiny_checkpoint)


def await_(condition: Callable[[], object], what: str) -> None:
    deadline, pause = Deadline(SECONDS), threading.Event()
    while not condition():
        deadline.check(what)
        pause.wait(0.05)


def outcomes(results: RunResults) -> Counter[tuple[str, str, str]]:
    return Counter((check.device, check.check, check.outcome) for check in results.checks)


EVERYTHING = {(d, f"test_{t}", "passed"): 1 for d in "ab" for t in ("one", "two", "three")}


ANYWHERE = "".join(
    f"""
@pytest.mark.device({condition!r}, any=True)
def test_{name}(cell):
    cell.for_all(programs.any_sequence(cell.limits), cell.run)
"""
    for name, condition in (*((f"anywhere_{n}", "kind==host") for n in range(6)), ("on_b", "name==b"))
)


def programs_of(log: list[dict[str, Any]], device: str) -> list[str]:
    return [e["program"] for e in log if e["device"] == device and e["what"] == "program" and e["began"]]


def test_each_device_works_in_one_worker_and_all_find_the_same_programs_as_one_process(
    spread: Spread,
) -> None:
    code, output = spread.pytest("--devices=a,b", "-n2")
    assert code == 0, output
    assert outcomes(spread.stored) == EVERYTHING
    assert "PASSED: 6/6 checks passed" in output
    assert "[  6/6]" in output
    workers = {
        e["device"]: {other["pid"] for other in spread.log if other["device"] == e["device"]}
        for e in spread.log
    }
    assert all(len(pids) == 1 for pids in workers.values())
    assert len(set.union(*workers.values())) == 2
    assert spread.leases() == []
    found = {device: programs_of(spread.log, device) for device in "ab"}
    assert found["a"] == found["b"]
    assert len(found["a"]) >= 9

    (spread.folder / "fake" / "log.jsonl").unlink()
    code, output = spread.pytest("--devices=a,b", "-n0")
    assert code == 0, output
    assert len({e["pid"] for e in spread.log}) == 1, "-n0 stays in this process"
    assert programs_of(spread.log, "a") == found["a"]


def test_a_measurement_has_the_machine_to_itself(spread: Spread) -> None:
    spread.suite(more=MEASURED)
    code, output = spread.pytest("--devices=a,b", "-n2")
    assert code == 0, output
    assert len(spread.stored.legs) == 2
    busy: set[tuple[str, str]] = set()
    for entry in spread.log:
        if entry["began"] and entry["what"] == "workload":
            assert busy == set(), f"{entry['device']} is measured while others work"
        key = entry["device"], entry["what"]
        busy = busy | {key} if entry["began"] else busy - {key}
        assert len(busy) == 1 or all(what == "program" for _, what in busy)


@pytest.mark.parametrize("processes", ["-n2", "-n0"])
def test_what_any_device_can_do_one_of_them_does(spread: Spread, processes: str) -> None:
    spread.suite(more=ANYWHERE)
    code, output = spread.pytest("--devices=a,b", processes)
    assert code == 0, output
    found = [(check.device, check.check) for check in spread.stored.checks]
    anywhere = [name for _, name in found if name.startswith("test_anywhere")]
    assert sorted(anywhere) == [f"test_anywhere_{n}" for n in range(6)], "each once, not once a device"
    assert ("b", "test_on_b") in found
    assert ("a", "test_on_b") not in found
    assert Counter(found) >= Counter((d, c) for d, c, _ in EVERYTHING), "all others on every device"
    assert spread.stored.planned_checks == len(found)
    assert "any-static · anywhere 0" in output
    assert spread.leases() == []


DIES_ONCE = """died = __import__('pathlib').Path('died')
    if cell.device == 'b' and not died.exists():
        cell.run(programs.Program(8, (programs.Prefill((1, 2)),)))
        died.touch(); os.kill(os.getpid(), signal.SIGKILL)"""
ALWAYS_DIES = """
def test_four(cell):
    if cell.device == 'a': os.kill(os.getpid(), signal.SIGKILL)

def test_five(cell): pass
"""


def test_a_test_whose_worker_dies_is_tried_again_and_one_that_kills_every_worker_is_lost_alone(
    spread: Spread,
) -> None:
    spread.suite(DIES_ONCE, ALWAYS_DIES)
    code, output = spread.pytest("--devices=a,b", "-n2", "--retries=1")
    assert code == 1, output
    found = outcomes(spread.stored)
    assert found.pop(("a", "test_four", "infrastructure")) == 1
    others = [
        *EVERYTHING,
        *((d, f"test_{t}", "passed") for d, t in (("a", "five"), ("b", "four"), ("b", "five"))),
    ]
    assert found == Counter(others)
    assert spread.stored.planned_checks == len(others) + 1
    tried = {(check.device, check.check) for check in spread.stored.checks if check.retries}
    assert tried == {("b", "test_two"), ("a", "test_four")}
    assert "tried again after the worker process of this device died" in output
    assert spread.leases() == []


def test_maxfail_ends_the_run_and_what_was_done_is_reported(spread: Spread) -> None:
    spread.suite("assert cell.device != 'a'")
    code, output = spread.pytest("--devices=a,b", "-n2", "--maxfail=1")
    assert code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED), output
    assert ("a", "test_two", "failed") in outcomes(spread.stored)
    assert ("a", "test_three", "passed") not in outcomes(spread.stored)
    assert spread.leases() == []
    assert json.loads((spread.folder / "report" / "results.json").read_text())["checks"]


SLOW = "open(f'begun-{cell.device}', 'w').close(); time.sleep(600)"


def test_ctrl_c_ends_all_and_reports_what_was_done(spread: Spread) -> None:
    spread.suite(SLOW)
    process, workers = both_at_work(spread)
    for each in (*workers, process):  # as a terminal does
        each.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    assert outcomes(spread.stored) == {(d, "test_one", "passed"): 1 for d in "ab"}
    assert spread.stored.finished_at is None
    assert not any(map(_lives, workers))
    assert "index.html" in output


def test_sigterm_ends_all_and_reports_what_was_done(spread: Spread) -> None:
    spread.suite(SLOW)
    process, workers = both_at_work(spread)
    for each in (process, *workers, process):  # as `timeout` does: the second must not cut the report short
        each.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    assert "INTERNALERROR" not in output
    assert outcomes(spread.stored) == {(d, "test_one", "passed"): 1 for d in "ab"}
    assert spread.stored.finished_at is None
    assert not any(map(_lives, workers))
    assert "index.html" in output


def test_when_the_controller_is_killed_its_workers_end_and_nothing_stored_is_lost(spread: Spread) -> None:
    spread.suite(SLOW)
    process, workers = both_at_work(spread)
    process.kill()
    process.communicate(timeout=SECONDS)
    await_(lambda: not any(map(_lives, workers)), "the workers to end")
    assert outcomes(spread.stored) == {(d, "test_one", "passed"): 1 for d in "ab"}


def both_at_work(spread: Spread) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run whose two devices hang in their second test, and its workers."""
    process = spread.start("--devices=a,b", "-n2")
    await_(lambda: len(list(spread.folder.glob("begun-*"))) == 2, "both devices to work")
    return process, psutil.Process(process.pid).children(recursive=True)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
