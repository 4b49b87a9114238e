"""Two users, two lab hosts, a phone on each: one's run is killed and goes on, and nobody loses anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from device_agents.bundle import build
from device_agents.deadline import Deadline
from device_agents.leases.check import violations
from device_agents.leases.ledger import JOURNAL, Entry, read
from device_agents.leases.model import Asked, Ended, Granted
from device_agents.virtual.rootfs import default_cache, native_abi, prepare
from harness.store import open_store
from reports.results import RunResults
from tests import cluster_lab
from tests.chaos.world import difference, report
from tests.cluster_lab import HEAD, ClusterLab, signal_inside

SECONDS = 300.0
PHONES = {"pixel": "rack1", "galaxy": "rack2"}
FARM = """
[devices.pixel]
kind = "android"
lab = "rack1"
options = { virtual = "true", profile = "pixel-8" }

[devices.galaxy]
kind = "android"
lab = "rack2"
options = { virtual = "true", profile = "galaxy-a54-arabic" }

[labs.rack1]
node = "rack1"

[labs.rack2]
node = "rack2"
"""
CHECKS, PLANNED = "p01 or p08 or p09 or latency", 8  # on two phones


class User:
    """Somebody's folder on the head, which runs the suite on both phones; their store is in it."""

    def __init__(self, lab: ClusterLab, name: str, checkpoint: Path) -> None:
        self.lab, self.name, self._checkpoint = lab, name, checkpoint
        self.folder = lab.folder / HEAD / name
        self.folder.mkdir()
        (self.folder / "farm.toml").write_text(FARM)

    def start(self) -> subprocess.Popen[str]:
        options = ["--recipes=static", "--examples=80", "--kvfarm-seed=7", "-k", CHECKS, "-n2", "-v"]
        options += [
            "--prompt=8",
            "--new-tokens=4",
            "--repeats=2",
            f"--user={self.name}",
            "--lease-timeout=8s",
        ]
        where = [f"--farm-address={self.lab.address}", f"--devices={','.join(PHONES)}"]
        return self._popen("-m", "pytest", f"--model={self._checkpoint}", *where, *options)

    def resume(self) -> subprocess.Popen[str]:
        return self._popen("-c", "from harness.cli import main; main()", "resume", "--last")

    def results(self) -> RunResults | None:
        """As far as they are stored; None: not even the run is."""
        path = self.folder / ".kvfarm" / "results.db"
        if not path.exists():
            return None
        with open_store(path) as store:
            return store.results(store.latest()) if store.runs() else None

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
    deadline, pause = Deadline(seconds), threading.Event()
    while not true():
        assert not deadline.expired, told()
        pause.wait(0.2)


def journal(lab: ClusterLab, phone: str) -> list[Entry]:
    """Of the phone's host; none before its first lease."""
    path = lab.folder / PHONES[phone] / "cache" / "kvfarm" / "leases" / JOURNAL
    return list(read(path)) if path.exists() else []


def asked(lab: ClusterLab, phone: str) -> dict[str, str]:
    """Who asked for it, by request."""
    facts = [entry.fact for entry in journal(lab, phone)]
    return {fact.request.id: fact.request.user for fact in facts if isinstance(fact, Asked)}


def granted_to(lab: ClusterLab, phone: str) -> list[str]:
    facts = [entry.fact for entry in journal(lab, phone)]
    return [asked(lab, phone)[fact.id] for fact in facts if isinstance(fact, Granted)]


def test_two_users_share_two_hosts_and_the_one_that_was_killed_goes_on(tiny_checkpoint: Path) -> None:
    if why := cluster_lab.missing():
        assert not os.environ.get("CI"), why
        pytest.skip(why)
    prepare(native_abi(), default_cache(), Deadline(300))
    build(native_abi(), default_cache() / "bundles")
    with ClusterLab(tuple(PHONES.values()), FARM, default_cache()) as lab:
        killed, other = User(lab, "ann", tiny_checkpoint), User(lab, "bob", tiny_checkpoint)
        processes = {killed: killed.start()}
        until(lambda: all(granted_to(lab, phone) for phone in PHONES), lambda: killed.log)
        processes[other] = other.start()
        until(lambda: all("bob" in asked(lab, phone).values() for phone in PHONES), lambda: other.log)
        until(lambda: killed.rows() >= 3, lambda: killed.log)
        signal_inside(processes[killed], signal.SIGKILL)
        assert processes[killed].wait(SECONDS) != 0
        before = killed.rows()
        processes[killed] = killed.resume()  # waits in line behind the other
        for user, process in processes.items():
            assert process.wait(SECONDS) == 0, user.log
        assert difference(told(killed.results()), told(other.results())) == ""
        assert killed.log.count(" ok ") == PLANNED - before, "finished work is not done again"
        for phone in PHONES:
            assert violations(journal(lab, phone)) == []
            assert granted_to(lab, phone) == ["ann", "bob", "ann"]
            ended = [entry.fact.why for entry in journal(lab, phone) if isinstance(entry.fact, Ended)]
            assert ended == ["no heartbeat for 8 s", "given back", "given back"]


def told(results: RunResults | None) -> Any:
    """All that the report tells and that does not depend on the moment: with each result once, and passed."""
    assert results is not None
    assert results.finished_at is not None
    checks = Counter((check.device, check.check, check.outcome) for check in results.checks)
    assert set(checks.values()) == {1}
    assert {outcome for _, _, outcome in checks} == {"passed"}
    assert len(checks) == results.planned_checks == PLANNED - len(PHONES)
    assert Counter(leg.device for leg in results.legs) == dict.fromkeys(PHONES, 1)
    found = report(results, strict=False)
    for check in found["checks"]:
        check["mean_kl"] = round(check["mean_kl"] or 0.0, 9)  # the reference's sums may be in another order
    return found | {"legs": {leg.device: leg.provenance["tokens"] for leg in results.legs}}
