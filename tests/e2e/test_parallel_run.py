"""Several devices at the same time with real Ray, leases and runners; see tests/harness/test_parallel.py."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from device_agents.deadline import Deadline
from tests.e2e.test_pytest_run import SECONDS, Run, run

__all__ = ["run"]  # the fixture

CHEAP = "p08 or p09 or latency"
FARM = "[devices.one]\n[devices.two]\n"


@pytest.fixture(scope="session")
def rays_own() -> Iterator[list[psutil.Process]]:
    """Ray's agents outlive their raylet by a minute, trying to reach it: awaited at the end of all."""
    agents: list[psutil.Process] = []
    yield agents
    _await_end_of(agents)


def test_a_killed_controller_leaves_nothing_running(run: Run, rays_own: list[psutil.Process]) -> None:
    (run.folder / "farm.toml").write_text(FARM)
    process = run.start("--devices=one,two", "--recipes=static", "--examples=10000", "-n2", "-k", CHEAP)
    try:
        family = _at_work(process.pid)
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)
    rays_own += [
        each for each in family if re.match("ray::(Dashboard|RuntimeEnv)Agent", " ".join(_cmdline(each)))
    ]
    assert len(rays_own) == 2
    _await_end_of([each for each in family if each not in rays_own])


def test_two_devices_share_one_ray_and_one_reference(run: Run) -> None:
    (run.folder / "farm.toml").write_text(FARM)
    code, output = run.pytest("--devices=one,two", "--recipes=static", "--examples=2", "-n2", "-k", CHEAP)
    assert code == 0, output
    results = run.results
    checks = Counter((check["device"], check["outcome"]) for check in results["checks"])
    assert checks == {("one", "passed"): 2, ("two", "passed"): 2}, output
    assert Counter(leg["device"] for leg in results["legs"]) == {"one": 1, "two": 1}
    assert {device["name"] for device in results["devices"]} == {"one", "two"}
    assert results["finished_at"] is not None
    programs = {(check["check"], check["programs"]) for check in results["checks"]}
    assert len(programs) == 2, "both devices ran the same"


def _at_work(pid: int) -> list[psutil.Process]:
    """All that descends from ``pid``, once two runners are there."""
    deadline, pause = Deadline(SECONDS), threading.Event()
    while True:
        family: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
        if sum("device_agents.runner" in " ".join(_cmdline(each)) for each in family) >= 2:
            return family
        deadline.check("two runners")
        pause.wait(0.1)


def _await_end_of(processes: list[psutil.Process]) -> None:
    deadline, pause = Deadline(SECONDS), threading.Event()
    while left := [each for each in processes if _lives(each)]:
        assert not deadline.expired, left
        pause.wait(0.1)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
