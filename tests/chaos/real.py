"""A few rounds with everything real: Ray, the runner and its engine, the reference, ``kvfarm resume``."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from device_agents.leases.check import violations
from device_agents.leases.ledger import JOURNAL, Ledger, read
from harness.store import open_store
from reports.results import RunResults
from tests.chaos.world import has_retries
from tests.soak import leftovers

KVFARM = str(Path(sys.executable).with_name("kvfarm"))
SECONDS = 240.0  # a round takes half a minute, one whose head is dead a minute more: Ray waits for it so long
# Of the suite: two checks that are quick, two that are not, and the measurement.
CHOSEN = "p01 or p02 or p08 or p09 or latency"
# Ray's own, which look for their dead head for a minute (docs/log.md, 2026-11-25).
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "dashboard", "runtime_env", "log_monitor")


@dataclass(frozen=True)
class RealFault:
    """victims: whose command lines have one of these in them; none: the client itself."""

    name: str
    victims: tuple[str, ...] = ()


REAL_FAULTS = (
    RealFault("client killed (Ray)"),
    RealFault("lab agent killed (Ray)", ("ray::LabActor",)),
    RealFault("Ray's node killed, with its actors", ("raylet/raylet ", "ray::")),
    # The head alone is missed by nobody for a minute; then Ray ends the client.
    RealFault("Ray's head and the lab agent killed", ("gcs/gcs_server", "ray::LabActor")),
)


@dataclass(frozen=True)
class CameReal:
    """As chaos.Came."""

    outcome: str
    seconds: float | None
    wrong: tuple[str, ...]


class RealRun:
    """A folder in which a user runs the suite on this host. mark: in the environment of all processes."""

    def __init__(self, folder: Path, checkpoint: Path, mark: str) -> None:
        self.folder, self._checkpoint, self._mark = folder, checkpoint, mark
        folder.mkdir(parents=True)
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CHAOS"))}
        self._environment |= {"KVFARM_LEASES": str(folder / "leases"), "KVFARM_SOAK": mark}
        self._log = (folder / "log").open("w")

    def start(self) -> subprocess.Popen[bytes]:
        options = ["--devices=host", "--recipes=static", "--examples=15", "--kvfarm-seed=7", "-k", CHOSEN]
        options += ["--prompt=8", "--new-tokens=4", "--repeats=2", "--recover-within=60"]
        return self._popen([sys.executable, "-m", "pytest", f"--model={self._checkpoint}", *options])

    def resume(self) -> int:
        with self._popen([KVFARM, "resume", "--last"]) as process:
            return process.wait(SECONDS)

    def results(self) -> RunResults:
        with open_store(self.folder / ".kvfarm" / "results.db") as store:
            return store.results(store.latest())

    def rows(self) -> int:
        if not (self.folder / ".kvfarm" / "results.db").exists():
            return 0
        with open_store(self.folder / ".kvfarm" / "results.db") as store:
            return sum(run.checks + run.legs for run in store.runs())

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]

    def wrong(self) -> list[str]:
        """All that should not be."""
        results, found = self.results(), list[str]()
        checks = Counter(c.check for c in results.checks)
        legs = Counter(leg.key for leg in results.legs)
        if set(checks.values()) != {1} or set(legs.values()) != {1} or not results.finished_at:
            found.append(f"sought each once and an end, found {checks}, {legs}, {results.finished_at}")
        if bad := [(c.check, c.outcome, c.message[:200]) for c in results.checks if c.outcome != "passed"]:
            found.append(f"not passed: {bad}")
        planned = results.planned_checks, results.planned_legs
        if (len(results.checks), len(results.legs)) != planned:
            found.append(f"sought {planned} results, found {len(results.checks)}, {len(results.legs)}")
        found += violations(read(self.folder / "leases" / JOURNAL))
        state = Ledger(self.folder / "leases").act()
        found += [f"{device} is still held" for device in state.held]
        return found + [f"a process: {each}" for each in self._left()]

    def _left(self) -> list[str]:
        end = time.monotonic() + 15.0
        while True:
            left = [line for line in leftovers.marked(self._mark).values() if not _is_rays(line)]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.2)

    def _popen(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=self.folder, stdout=self._log, stderr=self._log, env=self._environment
        )


def strike_for_real(run: RealRun, fault: RealFault, draw: random.Random) -> CameReal:
    """One round; gone on with until it is finished."""
    process = run.start()
    end = time.monotonic() + SECONDS
    try:
        while not run.rows():
            assert process.poll() is None, f"it ended before its first result: {run.log()}"
            assert time.monotonic() < end, f"no result: {run.log()}"
            time.sleep(0.1)
        time.sleep(draw.uniform(0.0, 1.0))
        before, struck = run.rows(), time.monotonic()
        _kill(process.pid, fault.victims)
        code = process.wait(SECONDS)
    finally:
        process.kill()
    seconds = None if run.rows() == before else time.monotonic() - struck
    resumed = False
    for _ in range(3):
        if code == 0:
            break
        resumed = True
        code = run.resume()
        seconds = seconds if seconds is not None else time.monotonic() - struck
    wrong = [] if code == 0 else [f"exit code {code}: {run.log()}"]
    wrong += run.wrong()
    retried = has_retries(run.results())
    return CameReal("resumed" if resumed else "retried" if retried else "survived", seconds, tuple(wrong))


def _kill(pid: int, victims: tuple[str, ...]) -> None:
    """The client, or those of its descendants that are meant, of each at least one."""
    client = psutil.Process(pid)
    if not victims:
        client.kill()
        return
    lines = {each: " ".join(_command(each)) for each in client.children(recursive=True)}
    for victim in victims:
        assert any(victim in line for line in lines.values()), f"no {victim} is there to be killed"
    for each, line in lines.items():
        if any(victim in line for victim in victims):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _is_rays(line: str) -> bool:
    return any(each in line for each in RAYS_OWN)
