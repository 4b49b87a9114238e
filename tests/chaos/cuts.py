"""Rounds with the network between hosts cut: a head and two lab hosts in namespaces, all real.

In each a user runs the suite over a device of each host; one host's cable is pulled at a moment that the
seed draws, and plugged in again after a while, or never.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
LEASE_S, RECOVER_S = 10, 90
ROUND_S = 240.0
# Quick ones and slow ones, so that a cut may be in the midst of anything.
OPTIONS = (
    *("--recipes=static", "--examples=15", "--kvfarm-seed=7", "-k", "p01 or p02 or p08 or p09 or latency"),
    *("--prompt=8", "--new-tokens=4", "--repeats=2", "-n2", "-v"),
    *(f"--lease-timeout={LEASE_S}s", f"--recover-within={RECOVER_S}"),
)


@dataclass(frozen=True)
class Cut:
    """lasts: s, from and to. killed: the client dies meanwhile, and its run is gone on with."""

    name: str
    lasts: tuple[float, float]
    killed: bool = False


CUTS = (
    Cut("network cut, shorter than a lease", (1.0, 5.0)),
    # Ray takes a node for dead that is silent for half a minute, and the lease has run out long before.
    Cut("network cut, longer than Ray waits", (45.0, 50.0)),
    Cut("network cut, client killed meanwhile", (5.0, 15.0), killed=True),
)


class CutLab:
    """A lab and what a run comes to that nothing happens to."""

    def __init__(self, lab: ClusterLab, checkpoint: Path) -> None:
        self._lab, self._checkpoint = lab, checkpoint
        self._expected: RunResults | None = None
        self._users = 0

    def undisturbed(self) -> None:
        """Has to be before the first cut. Raises AssertionError."""
        user = self._user()
        process = user.start()
        assert process.wait(ROUND_S) == 0, user.log
        self._expected = user.results()
        assert not (found := wrong(self._expected, tuple(DEVICES))), found

    def strike(self, cut: Cut, draw: random.Random) -> CameReal:
        """One round, gone on with until it is finished."""
        user, host = self._user(), draw.choice(list(DEVICES.values()))
        process, resumed = user.start(), False
        try:
            until(lambda: user.rows() > 0 or process.poll() is not None, lambda: user.log, ROUND_S)
            time.sleep(draw.uniform(0.0, 2.0))
            before, struck = user.rows(), time.monotonic()
            with self._cut(host):
                if cut.killed:
                    time.sleep(draw.uniform(0.0, 2.0))
                    kill(process)
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
        found = [f"exit code {code}: {said[-3000:]}{user.log[-3000:]}"] if code else self._wrong(results)
        retried = results is not None and has_retries(results)
        return CameReal("resumed" if resumed else "retried" if retried else "survived", seconds, tuple(found))

    def _user(self) -> User:
        self._users += 1
        return User(self._lab, f"user{self._users}", self._checkpoint, tuple(DEVICES), OPTIONS, FARM)

    @contextmanager
    def _cut(self, host: str) -> Iterator[None]:
        self._lab.cut(host)
        try:
            yield
        finally:
            self._lab.mend(host)

    def _wrong(self, results: RunResults | None) -> list[str]:
        found = wrong(results, tuple(DEVICES))
        if other := difference(told(results), told(self._expected)):
            found.append(f"another report: {other}")
        return found + [line for host in DEVICES.values() for line in Journal(self._lab, host).wrong()]


@contextmanager
def cut_lab(folder: Path) -> Iterator[CutLab]:
    """folder: for the checkpoint. Needs what tests.cluster_lab.missing tells of."""
    checkpoint = synth("tiny-gemma3", folder / "tiny-gemma3")
    with ClusterLab(tuple(DEVICES.values()), FARM) as lab:
        made = CutLab(lab, checkpoint)
        made.undisturbed()
        yield made
