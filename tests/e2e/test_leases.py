"""Several users of one device, each a process of its own: they stand in line, and nobody's death keeps it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from device_agents.deadline import Deadline
from device_agents.leases import protocol
from device_agents.leases.check import violations
from device_agents.leases.ledger import JOURNAL, Entry, Ledger, read
from device_agents.leases.model import Ended, Granted, Held, Request, State
from harness.lab import leases_folder
from tests.e2e.test_pytest_run import SECONDS, Run, run

__all__ = ["run"]  # the fixture

LEASE = "from harness.cli import main; main()"
HOLDER = """
import threading
from harness.farm import Farm
from harness.inventory import DEFAULT
from harness.leasing import Terms
with Farm(DEFAULT, ("host",), terms=Terms(beat_s=2.0)) as farm:
    farm.hold(1, ("host",))
    threading.Event().wait(300)
"""


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(leases_folder())


@contextmanager
def kvfarm_lease(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", LEASE, "lease", "host", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


def until(ledger: Ledger, true: Callable[[State], Any], what: str, seconds: float = SECONDS) -> State:
    deadline, pause = Deadline(seconds), threading.Event()
    while not true(state := ledger.state()[0]):
        deadline.check(f"{what}; {state}")
        pause.wait(0.1)
    return state


def holder(state: State) -> Held | None:
    held = state.held.get("host")
    return None if held is None or held.ended else held


def held_by(process: subprocess.Popen[str]) -> Callable[[State], bool]:
    return lambda state: (held := holder(state)) is not None and f"pid {process.pid}" in held.request.holder


def of(kind: type[Any]) -> list[Entry]:
    return [entry for entry in read(leases_folder() / JOURNAL) if isinstance(entry.fact, kind)]


def test_two_runs_at_once_in_one_folder_stand_in_line_and_are_both_green(run: Run, ledger: Ledger) -> None:
    ours = Request("ours", "us", "the test", ("host",))
    ledger.act(protocol.ask(ours, ledger.rules, wait=False))
    options = ("--devices=farm", "--recipes=static", "-k", "latency")
    runs = [run.start(*options, f"--report=report{number}") for number in (1, 2)]
    until(ledger, lambda state: len(state.waiting) == 2, "both wait")
    ledger.act(protocol.withdraw("ours", "done"))
    ledger.act(protocol.freed("host", ledger.state()[0].token))
    outputs = [process.communicate(timeout=SECONDS)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], "\n".join(outputs)
    for number in (1, 2):
        results = json.loads((run.folder / f"report{number}" / "results.json").read_text())
        assert [leg["device"] for leg in results["legs"]] == ["host"]
    assert all(re.search(r"waited \d+ s", output) for output in outputs), "each says that it waited"
    assert violations(read(ledger.path)) == []
    _, first, second = of(Granted)
    ends = [entry for entry in of(Ended) if entry.fact.token == first.fact.token]  # type: ignore[union-attr]
    assert first.at < ends[0].at < second.at
    assert ledger.act().held == {}


def test_what_a_killed_or_silent_holder_had_goes_to_the_next(tmp_path: Path, ledger: Ledger) -> None:
    silent = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=tmp_path, text=True)
    try:
        until(ledger, held_by(silent), "somebody has the device")
        os.kill(silent.pid, signal.SIGSTOP)
        with kvfarm_lease(tmp_path, "--user=ann") as killed:
            until(ledger, held_by(killed), "what the silent one had is taken", 30)
            with kvfarm_lease(tmp_path, "--user=bob", "--for=1s") as next_:
                until(ledger, lambda state: state.waiting, "bob waits")
                killed.kill()
                until(ledger, held_by(next_), "what the killed one had is taken", 30)
                said, noted = next_.communicate(timeout=SECONDS)
    finally:
        silent.kill()
        silent.communicate(timeout=SECONDS)
    assert next_.returncode == 0, noted
    assert "host is yours until" in said
    assert f"host is leased to 'ann@{os.uname().nodename} pid {killed.pid}'" in noted
    assert "given back: host" in noted
    assert [entry.fact.why for entry in of(Ended)] == [  # type: ignore[union-attr]
        "no heartbeat for 2 s",
        "its process is gone",
        "its 1 s are over",
    ]
    assert violations(read(ledger.path)) == []


def test_who_gives_up_is_told_who_has_it_and_who_has_it_gives_it_back_on_sigterm(
    tmp_path: Path, ledger: Ledger
) -> None:
    ledger.act(protocol.ask(Request("ours", "us", "ann@lab", ("host",)), ledger.rules, wait=False))
    with kvfarm_lease(tmp_path, "--for=5m", "--json") as ours, kvfarm_lease(tmp_path, "--wait=0s") as refused:
        _, noted = refused.communicate(timeout=SECONDS)
        assert refused.returncode == 2
        assert "kvfarm: waited 0 s: host is leased to 'ann@lab' since" in noted
        ledger.act(protocol.withdraw("ours", "done"))
        ledger.act(protocol.freed("host", ledger.state()[0].token))
        held = holder(until(ledger, held_by(ours), "the other has it"))
        assert held is not None
        assert held.request.limit_s == 300
        assert ours.stdout is not None
        said = ours.stdout.readline()  # before it has said so it would have been interrupted while it waited
        ours.terminate()
        _, noted = ours.communicate(timeout=SECONDS)
    assert ours.returncode == 0, noted
    assert f'"token": {held.token}' in said
    assert ledger.state()[0].held == {}
