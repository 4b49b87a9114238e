"""Users of a lab in namespaces: each runs the suite over its devices from a folder on the head's machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from device_agents.deadline import Deadline
from device_agents.leases.check import violations
from device_agents.leases.ledger import JOURNAL, Entry, read
from device_agents.leases.model import Asked, Ended, Granted
from harness.store import open_store
from reports.results import RunResults
from tests.chaos.world import report
from tests.cluster_lab import HEAD, ClusterLab, signal_inside

SECONDS = 300.0


class User:
    """Somebody's folder on the head, from which they run the suite; their store is in it.

    farm: text of their farm.toml; "": what the lab offers. options: further ones of pytest.
    """

    def __init__(
        self,
        lab: ClusterLab,
        name: str,
        checkpoint: Path,
        devices: Sequence[str],
        options: Sequence[str],
        farm: str = "",
    ) -> None:
        self.lab, self.name, self._checkpoint = lab, name, checkpoint
        self.devices, self._options = tuple(devices), tuple(options)
        self.folder = lab.folder / HEAD / name
        self.folder.mkdir()
        if farm:
            (self.folder / "farm.toml").write_text(farm)

    def start(self) -> subprocess.Popen[str]:
        where = [f"--farm-address={self.lab.address}", f"--devices={','.join(self.devices)}"]
        own = [f"--user={self.name}", *self._options]
        return self._popen("-m", "pytest", f"--model={self._checkpoint}", *where, *own)

    def resume(self) -> subprocess.Popen[str]:
        return self._popen("-c", "from harness.cli import main; main()", "resume", "--last")

    def results(self) -> RunResults | None:
        """As far as they are stored; None: not even the run is."""
        path = self.folder / ".kvfarm" / "results.db"
        if not path.exists():
            return None
        with open_store(path) as store:
            return store.results(store.latest()) if store.runs() else None

    def finished(self) -> bool:
        found = self.results()
        return found is not None and found.finished_at is not None

    def rows(self) -> int:
        found = self.results()
        return len(found.checks) + len(found.legs) if found else 0

    @property
    def log(self) -> str:
        """Of the command that was started last."""
        return (self.folder / "log").read_text(errors="replace")

    def _popen(self, *arguments: str) -> subprocess.Popen[str]:
        command = ("env", "-C", str(self.folder), sys.executable, *arguments)
        with (self.folder / "log").open("w") as log:
            return self.lab.popen(HEAD, *command, stdout=log, stderr=subprocess.STDOUT)


def until(true: Callable[[], bool], told: Callable[[], str], seconds: float = SECONDS) -> None:
    """told: what is said when it does not come true in time."""
    deadline, pause = Deadline(seconds), threading.Event()
    while not true():
        assert not deadline.expired, told()
        pause.wait(0.2)


def kill(process: subprocess.Popen[str]) -> None:
    """What ``User`` started, by SIGKILL; returns when it is gone."""
    signal_inside(process, signal.SIGKILL)
    process.wait(SECONDS)


class Journal:
    """The leases of one lab host, by its journal."""

    def __init__(self, lab: ClusterLab, host: str) -> None:
        self.host = host
        self._path = lab.folder / host / "cache" / "kvfarm" / "leases" / JOURNAL

    def entries(self) -> list[Entry]:
        """None before its first lease."""
        return list(read(self._path)) if self._path.exists() else []

    def asked(self) -> dict[str, str]:
        """Who asked, by request."""
        facts = [entry.fact for entry in self.entries()]
        return {fact.request.id: fact.request.user for fact in facts if isinstance(fact, Asked)}

    def granted_to(self) -> list[str]:
        """Users, in the order of their leases."""
        facts, asked = [entry.fact for entry in self.entries()], self.asked()
        return [asked[fact.id] for fact in facts if isinstance(fact, Granted)]

    def ended(self) -> list[str]:
        """Why leases ended, in this order."""
        return [entry.fact.why for entry in self.entries() if isinstance(entry.fact, Ended)]

    def wrong(self) -> list[str]:
        """All that should not be when everybody has gone home."""
        found = violations(self.entries())
        still = len(self.granted_to()) - len(self.ended())
        return [f"{self.host}: {each}" for each in found + ([f"{still} leases did not end"] if still else [])]


def told(results: RunResults | None) -> Any:
    """All that the report tells and that does not depend on the moment."""
    assert results is not None
    found = report(results, strict=False)
    for check in found["checks"]:
        check["mean_kl"] = round(check["mean_kl"] or 0.0, 9)  # the reference's sums may be in another order
    return found | {"legs": {leg.device: leg.provenance["tokens"] for leg in results.legs}}


def wrong(results: RunResults | None, devices: Sequence[str]) -> list[str]:
    """What of a finished run is not there exactly once, or did not pass."""
    if results is None or not results.finished_at:
        return ["the run is not finished"]
    found = list[str]()
    checks = Counter((check.device, check.check) for check in results.checks)
    legs = Counter(leg.device for leg in results.legs)
    if set(checks.values()) != {1} or len(checks) != results.planned_checks:
        found.append(f"sought {results.planned_checks} checks, each once, found {checks}")
    if legs != dict.fromkeys(devices, 1) or len(legs) != results.planned_legs:
        found.append(f"sought a leg of each of {devices}, found {legs}")
    bad = [(c.device, c.check, c.outcome, c.message[:200]) for c in results.checks if c.outcome != "passed"]
    return found + ([f"not passed: {bad}"] if bad else [])
