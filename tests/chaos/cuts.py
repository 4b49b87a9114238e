"""Rounds with the network between hosts cut: a head and two lab hosts in namespaces, all real.

In each a user runs the suite over a device of each host; the cable of one host, or of both, is pulled at a
moment of the run that the seed draws, and plugged in again after a while, or only when the run has ended.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.synth import synth
from reports.results import RunResults
from tests.chaos.real import CameReal
from tests.chaos.world import difference, has_retries
from tests.cluster_lab import ClusterLab
from tests.cluster_user import Journal, User, kill, told, until, wrong

DEVICES = {"one": "rack1", "two": "rack2"}
FARM = "".join(
    f'[devices.{name}]\nlab = "{host}"\n[labs.{host}]\nnode = "{host}"\n' for name, host in DEVICES.items()
)
LEASE_S = 10
ROUND_S = 240.0
# Quick ones and slow ones, so that a cut may be in the midst of anything.
OPTIONS = (
    *("--recipes=static", "--examples=15", "--kvfarm-seed=7", "-k", "p01 or p02 or p08 or p09 or latency"),
    *("--prompt=8", "--new-tokens=4", "--repeats=2", "-n2", "-v", f"--lease-timeout={LEASE_S}s"),
)


@dataclass(frozen=True)
class Cut:
    """lasts: s, from and to; None: until the run has ended. hosts: so many are cut off at once. killed: the
    client dies meanwhile, and its run is gone on with. recover_s: how long a run waits for a device."""

    name: str
    lasts: tuple[float, float] | None
    hosts: int = 1
    killed: bool = False
    recover_s: int = 90


CUTS = (
    Cut("network cut, shorter than a lease", (1.0, 5.0)),
    Cut("network cut, longer than a lease", (13.0, 18.0)),
    # Ray takes a node for dead that is silent for half a minute, and the lease has run out long before.
    Cut("network cut, longer than Ray waits", (45.0, 50.0)),
    Cut("network cut, both hosts", (5.0, 15.0), hosts=2),
    Cut("network cut, client killed meanwhile", (5.0, 15.0), killed=True),
    Cut("network cut, never mended", None, recover_s=15),
)


class CutLab:
    """A lab and what a run comes to that nothing happens to."""

    def __init__(self, lab: ClusterLab, checkpoint: Path) -> None:
        self._lab, self._checkpoint = lab, checkpoint
        self._expected: RunResults | None = None
        self._run_s = 0.0
        self._users = 0

    def undisturbed(self) -> None:
        """Has to be before the first cut. Raises AssertionError."""
        user = self._user()
        process = user.start()
        began = _begun(user, process)
        assert process.wait(ROUND_S) == 0, user.log
        self._run_s = time.monotonic() - began
        self._expected = user.results()
        assert not (found := wrong(self._expected, tuple(DEVICES))), found

    def strike(self, cut: Cut, draw: random.Random) -> CameReal:
        """One round, gone on with until it is finished."""
        user, hosts = self._user(cut.recover_s), draw.sample(sorted(DEVICES.values()), cut.hosts)
        process, resumed = user.start(), False
        try:
            _begun(user, process)
            time.sleep(draw.uniform(0.0, 0.8 * self._run_s))
            assert process.poll() is None, f"it ended before the cut: {user.log[-3000:]}"
            before, struck = user.rows(), time.monotonic()
            with self._cut(hosts):
                if cut.killed:
                    time.sleep(draw.uniform(0.0, 2.0))
                    kill(process)
                if cut.lasts is None:
                    process.wait(ROUND_S)
                else:
                    time.sleep(draw.uniform(*cut.lasts))
            until(lambda: user.rows() > before or process.poll() is not None, lambda: user.log, ROUND_S)
            seconds = time.monotonic() - struck if user.rows() > before else None
            code = process.wait(ROUND_S)
            said = user.log
            if code and not user.finished():
                resumed = True
                process = user.resume()
                code = process.wait(ROUND_S)
        finally:
            kill(process)
        results = user.results()
        if cut.lasts is None:
            found = self._without(results, hosts) + self._next_user()
        else:
            found = self._wrong(results) + ([f"exit code {code}"] if code else [])
        if found:
            found.append(f"{hosts} at {before} rows: {said[-3000:]}{user.log[-3000:]}")
        retried = results is not None and has_retries(results)
        return CameReal("resumed" if resumed else "retried" if retried else "survived", seconds, tuple(found))

    def _user(self, recover_s: int = 90) -> User:
        self._users += 1
        options = (*OPTIONS, f"--recover-within={recover_s}")
        return User(self._lab, f"user{self._users}", self._checkpoint, tuple(DEVICES), options, FARM)

    @contextmanager
    def _cut(self, hosts: Sequence[str]) -> Iterator[None]:
        for host in hosts:
            self._lab.cut(host)
        try:
            yield
        finally:
            for host in hosts:
                self._lab.mend(host)

    def _wrong(self, results: RunResults | None) -> list[str]:
        found = wrong(results, tuple(DEVICES))
        if other := difference(told(results), told(self._expected)):
            found.append(f"another report: {other}")
        return found + [line for host in DEVICES.values() for line in Journal(self._lab, host).wrong()]

    def _without(self, results: RunResults | None, hosts: Sequence[str]) -> list[str]:
        """What is wrong with a run whose hosts never came back: their devices are set aside, no answer of
        theirs is taken for the engine's, and what is on the others is whole."""
        if results is None or not results.finished_at:
            return ["the run is not finished"]
        lost = {name for name, host in DEVICES.items() if host in hosts}
        found = list[str]()
        counts = Counter((check.device, check.check) for check in results.checks)
        if set(counts.values()) != {1} or len(counts) != results.planned_checks:
            found.append(f"sought {results.planned_checks} checks, each once, found {counts}")
        theirs = [check for check in results.checks if check.device in lost]
        if bad := [c.check for c in theirs if c.outcome not in ("passed", "infrastructure")]:
            found.append(f"for want of a network: {bad}")
        for device in results.devices:
            if (device.name in lost) != bool(device.quarantined):
                found.append(f"{device.name} is set aside: {device.quarantined!r}, cut off: {lost}")
        if other := difference(_of_others(told(results), lost), _of_others(told(self._expected), lost)):
            found.append(f"another report of the others: {other}")
        return found

    def _next_user(self) -> list[str]:
        """Once the network is mended, everybody has all devices again."""
        self._lab.wait(lambda hosts: all(hosts[each]["state"] == "ready" for each in DEVICES.values()))
        user = self._user()
        code = user.start().wait(ROUND_S)
        found = self._wrong(user.results()) + ([f"exit code {code}: {user.log[-3000:]}"] if code else [])
        return [f"the next user: {each}" for each in found]


def _begun(user: User, process: Any) -> float:
    """The moment from which there is a run to be gone on with, monotonic, s."""
    until(lambda: user.results() is not None or process.poll() is not None, lambda: user.log, ROUND_S)
    return time.monotonic()


def _of_others(report: Any, lost: set[str]) -> Any:
    mine = {
        "checks": [row for row in report["checks"] if row["device"] not in lost],
        "devices": [row for row in report["devices"] if row["name"] not in lost],
        "legs": {device: tokens for device, tokens in report["legs"].items() if device not in lost},
    }
    return report | mine


@contextmanager
def cut_lab(folder: Path) -> Iterator[CutLab]:
    """folder: for the checkpoint. Needs what tests.cluster_lab.missing tells of."""
    checkpoint = synth("tiny-gemma3", folder / "tiny-gemma3")
    with ClusterLab(tuple(DEVICES.values()), FARM) as lab:
        made = CutLab(lab, checkpoint)
        made.undisturbed()
        yield made
