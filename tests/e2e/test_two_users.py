"""Two users, two lab hosts, a phone on each: one's run is killed and goes on, and nobody loses anything."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from device_agents.bundle import build
from device_agents.deadline import Deadline
from device_agents.leases.model import Freed
from device_agents.virtual.rootfs import default_cache, native_abi, prepare
from tests import cluster_lab
from tests.chaos.world import difference
from tests.cluster_lab import HEAD, ClusterLab, signal_inside
from tests.cluster_user import SECONDS, Journal, User, kill, told, until, wrong
from tests.soak import leftovers

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
LEASE_S = 8
OPTIONS = (
    *("--recipes=static", "--examples=4", "--kvfarm-seed=7", "-k", CHECKS, "-n2", "-v", "-p", "holding"),
    *("--prompt=8", "--new-tokens=4", "--repeats=2", f"--lease-timeout={LEASE_S}s"),
)
# A plugin of both: each worker of pytest stands still after its second test, until this file is there. So
# whoever is killed is at work until then, however fast the machine.
GO = "go"
HOLDING = """
import pathlib, threading, time

tests = 0

def pytest_runtest_teardown(item):
    global tests
    tests += 1
    end, pause = time.monotonic() + 300, threading.Event()
    while tests == 2 and not pathlib.Path("../{GO}").exists():
        assert time.monotonic() < end, "nobody said that it may go on"
        pause.wait(0.1)
""".replace("{GO}", GO)
FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=60).read().decode())"


def test_two_users_share_two_hosts_and_the_one_that_was_killed_goes_on(
    tiny_checkpoint: Path, record_property: Callable[[str, object], None]
) -> None:
    if why := cluster_lab.missing():
        assert not os.environ.get("CI"), why
        pytest.skip(why)
    prepare(native_abi(), default_cache(), Deadline(300))
    build(native_abi(), default_cache() / "bundles")
    began = time.monotonic()
    with ClusterLab(tuple(PHONES.values()), FARM, default_cache()) as lab:
        killed, other = (
            User(lab, name, tiny_checkpoint, tuple(PHONES), OPTIONS, FARM) for name in ("ann", "bob")
        )
        for user in (killed, other):
            (user.folder / "holding.py").write_text(HOLDING)
        journals = [Journal(lab, host) for host in PHONES.values()]
        with live_page(lab) as state:
            processes = {killed: killed.start()}
            until(lambda: all(journal.granted_to() for journal in journals), lambda: killed.log)
            processes[other] = other.start()
            until(lambda: all("bob" in each.asked().values() for each in journals), lambda: other.log)
            shows_both(state())
        until(lambda: killed.rows() >= 3, lambda: killed.log)
        struck = time.monotonic()
        kill(processes[killed])
        (killed.folder.parent / GO).touch()
        before = killed.rows()
        processes[killed] = killed.resume()  # waits in line behind the other
        for user, process in processes.items():
            assert process.wait(SECONDS) == 0, user.log
            assert wrong(user.results(), tuple(PHONES)) == []
        assert difference(told(killed.results()), told(other.results())) == ""
        assert killed.log.count(" ok ") == PLANNED - before, "finished work is not done again"
        for journal in journals:
            assert journal.wrong() == []
            assert journal.granted_to() == ["ann", "bob", "ann"]
            assert journal.ended() == [f"no heartbeat for {LEASE_S} s", "given back", "given back"]
        audited(lab)
        freed = [next(e.at for e in j.entries() if isinstance(e.fact, Freed)) - struck for j in journals]
        record_property("seconds until the killed client's leases were free", freed)
    record_property("seconds of the lab", time.monotonic() - began)
    # Namespaces live as long as their processes, and ports as long as both.
    assert leftovers.marked(str(lab.folder)) == {}
    assert not lab.folder.exists()


@contextmanager
def live_page(lab: ClusterLab) -> Iterator[Callable[[], dict[str, Any]]]:
    """`kvfarm dash` on the head's machine, over the whole lab: what its page knows."""
    command = (sys.executable, "-c", "from harness.cli import main; main()", "dash", "--port=0")
    said = lab.folder / HEAD / "dash.log"
    with said.open("w") as log:
        process = lab.popen(HEAD, *command, f"--farm-address={lab.address}", stdout=log, stderr=log)
    try:
        until(lambda: "until Ctrl-C" in said.read_text() or process.poll() is not None, said.read_text)
        found = re.search(r"http://127\.0\.0\.1:\d+/", said.read_text())
        assert found, said.read_text()

        def state() -> dict[str, Any]:
            fetch = (sys.executable, "-c", FETCH, f"{found[0]}api/state")
            asked = lab.popen(HEAD, *fetch, stdout=subprocess.PIPE)
            answer: dict[str, Any] = json.loads(asked.communicate(timeout=SECONDS)[0])
            return answer

        yield state
        signal_inside(process, signal.SIGINT)
        assert process.wait(SECONDS) in (0, 130), said.read_text()
    finally:
        kill(process)


def shows_both(state: dict[str, Any]) -> None:
    """The page, while one has both phones and the other waits for them."""
    assert state["problems"] == []
    devices = {each["name"]: each for each in state["devices"]}
    assert {name: each["host"] for name, each in devices.items()} == PHONES
    assert {each["lease"]["user"] for each in devices.values()} == {"ann"}
    waiting = {name for each in state["waiting"] for name in each["devices"] if "bob" in each["holder"]}
    assert waiting == set(PHONES)


def audited(lab: ClusterLab) -> None:
    """`kvfarm audit`, when all have gone home."""
    done = lab.kvfarm(HEAD, "audit", "--farm-address", lab.address, "--json", seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    events = json.loads(done.stdout)["events"]
    deeds = [
        (each["host"], each["device"], each["who"].partition("@")[0])
        for each in events
        if each["what"] == "leased"
    ]
    wanted = [(host, phone, user) for phone, host in PHONES.items() for user in ("ann", "bob", "ann")]
    assert sorted(deeds) == sorted(wanted)
