"""The journal of leases: shared by processes, whole after a crash at any byte, judged by its checker."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from device_agents.errors import InfrastructureError, LeaseError
from device_agents.leases import ledger as ledger_module
from device_agents.leases import protocol
from device_agents.leases.check import violations
from device_agents.leases.ledger import JOURNAL, Ledger, parse, read
from device_agents.leases.model import Freed, Granted, Process, Request, Rules
from device_agents.leases.process import is_dead, process, this_process

RULES = Rules()
ONE = Request("1", "ann", "ann@lab", ("a", "b"), 2, agent="agent", limit_s=600)


def ask(request: Request, wait: bool = True) -> protocol.Command:
    return protocol.ask(request, RULES, wait=wait)


def test_what_one_ledger_writes_another_knows(tmp_path: Path) -> None:
    ours, theirs = Ledger(tmp_path), Ledger(tmp_path)
    ours.act(ask(ONE))
    theirs.act(ask(replace(ONE, id="2")))
    state, _ = ours.state()
    assert [held.request.id for held in state.held.values()] == ["1", "1"]
    assert list(state.waiting) == ["2"]
    assert violations(read(tmp_path / JOURNAL)) == []


def test_after_a_crash_at_any_byte_what_was_whole_counts_and_no_token_comes_twice(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "first")
    first.act(ask(ONE))
    first.act(protocol.withdraw("1", "done"))
    text = first.path.read_bytes()
    largest = first.state()[0].token
    for end in range(text.index(b"\n") + 1, len(text) + 1):
        folder = tmp_path / str(end)
        folder.mkdir()
        (folder / JOURNAL).write_bytes(text[:end])
        again = Ledger(folder)
        granted = [e.fact.token for e in read(folder / JOURNAL) if isinstance(e.fact, Granted)]
        state = again.act(ask(replace(ONE, id="2", devices=("c",), count=1)))
        assert state.held["c"].token > max(granted, default=0)
        assert state.held["c"].token <= largest + 1
        assert violations(read(folder / JOURNAL)) == []


def test_a_machine_that_started_again_holds_nothing_but_quarantines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Ledger(tmp_path, clock=lambda: 5000.0)
    token = before.act(ask(ONE)).token
    before.act(protocol.quarantine("c", "swollen", "ann", 100.0))
    before.act(protocol.drain("bob", "new hub"))
    monkeypatch.setattr(ledger_module, "boot_id", lambda: "another")
    after = Ledger(tmp_path, clock=lambda: 3.0)
    state, _ = after.state()
    assert state.held == {}
    assert state.quarantined["c"].until == 103.0
    assert state.drained == "by bob: new hub"
    after.act(protocol.drain("bob", ""))
    assert after.act(ask(replace(ONE, id="2"))).token > token
    assert violations(read(tmp_path / JOURNAL)) == []


def test_who_may_not_wait_leaves_no_trace(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.act(ask(ONE))
    before = ledger.path.read_bytes()
    with pytest.raises(LeaseError, match="a is leased to 'ann@lab'"):
        ledger.act(ask(replace(ONE, id="2"), wait=False))
    assert ledger.path.read_bytes() == before


def test_a_journal_that_grows_begins_again_with_what_it_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "LONGEST_BYTES", 3000)
    ours, theirs = Ledger(tmp_path), Ledger(tmp_path)
    ours.act(ask(ONE))
    theirs.act(protocol.quarantine("c", "swollen", "ann", None))
    for _ in range(60):
        ours.act(protocol.beat("1", RULES))
    assert ours.path.stat().st_size < 6000
    assert theirs.state()[0] == ours.state()[0] == Ledger(tmp_path).state()[0]
    assert theirs.state()[0].held.keys() == {"a", "b"}
    assert violations(read(tmp_path / JOURNAL)) == []


def test_a_full_disk_is_said_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)

    def full(file: int) -> None:
        os.ftruncate(file, os.fstat(file).st_size - 5)  # the last bytes found no room
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InfrastructureError, match="cannot be written: No space left") as found:
            ledger.act(ask(ONE))
    assert not isinstance(found.value, LeaseError)  # which would mean that a lease is lost
    assert not ledger.state()[0].waiting
    assert ledger.act(ask(replace(ONE, id="2"))).of("2")
    assert violations(read(tmp_path / JOURNAL)) == []


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Each wants the device, works and gives it back; the journal tells whether two ever had it."""
    script = (
        "import sys, uuid; from pathlib import Path; from dataclasses import replace\n"
        "from tests.device_agents.test_ledger import *\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "ledger.act(protocol.start(sys.argv[2], this_process()))\n"
        "for turn in range(10):\n"
        "    mine = replace(ONE, id=f'{sys.argv[2]}.{turn}', devices=('a',), count=1, agent=sys.argv[2])\n"
        "    while not (held := ledger.act(ask(mine)).of(mine.id)): pass\n"
        "    ledger.act(protocol.withdraw(mine.id, 'done'))\n"
        "    ledger.act(protocol.freed('a', held[0].token))\n"
    )
    clients = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), f"agent {number}"])
        for number in range(3)
    ]
    assert [client.wait(120) for client in clients] == [0, 0, 0]
    entries = read(tmp_path / JOURNAL)
    assert sum(isinstance(entry.fact, Granted) for entry in entries) == 30
    assert violations(entries) == []


# -- who lives --------------------------------------------------------------------------------


def test_what_a_dead_process_had_is_free_at_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    client = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ledger.act(protocol.start("agent", this_process()))
    ledger.act(ask(replace(ONE, client=process(client.pid))))
    assert not any(held.ended for held in ledger.act().held.values())
    client.kill()
    os.waitid(os.P_PID, client.pid, os.WEXITED | os.WNOWAIT)  # not yet reaped: a zombie is as dead
    state = ledger.act()
    client.communicate()
    assert {held.ended for held in state.held.values()} == {"its process is gone"}
    # Its agent, which is us, lives: it has to stop what runs there first.
    ledger.act(protocol.freed("a", state.token))
    assert ledger.act().held.keys() == {"b"}


def test_what_a_dead_agent_leaves_unclean_is_clean(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ledger.act(protocol.start("agent", process(child.pid)))
    ledger.act(ask(ONE))
    ledger.act(protocol.withdraw("1", "done"))
    assert ledger.act().held.keys() == {"a", "b"}
    child.kill()
    child.communicate()
    assert ledger.act().held == {}


def test_a_process_elsewhere_is_never_known_to_be_dead() -> None:
    assert is_dead(Process(this_process().host, os.getpid(), 1))  # another had our PID before
    assert not is_dead(Process("another host", 2**22 + 1, 1))


# -- the checker itself -----------------------------------------------------------------------


def journal(folder: Path) -> list[bytes]:
    """Two devices leased, given back, and leased again."""
    ledger = Ledger(folder, clock=iter(range(1000, 2000)).__next__)
    ledger.act(ask(replace(ONE, limit_s=3000, beat_s=2000)))
    token = ledger.act(protocol.withdraw("1", "done")).token
    for device in ("a", "b"):
        ledger.act(protocol.freed(device, token))
    ledger.act(ask(replace(ONE, id="2", limit_s=3000, beat_s=2000)))
    return ledger.path.read_bytes().splitlines()


def without(kind: str) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [line for line in lines if f'"kind": "{kind}"'.encode() not in line]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("freed"), "a has two holders"),
        (without("ended"), "a is freed in the middle of its lease"),
        (without("asked"), "1 is granted and had not asked"),
        (lambda lines: [*lines, lines[2]], "1 is granted and had not asked"),
        (lambda lines: [*lines[:2], lines[2].replace(b'["a", "b"]', b'["a"]'), *lines[3:]], "1 devices of 2"),
        (
            lambda lines: [*lines[:2], lines[2].replace(b'["a", "b"]', b'["a", "x"]'), *lines[3:]],
            "x was not asked",
        ),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "time goes back"),
    ],
)
def test_the_checker_sees(damage: Callable[[list[bytes]], list[bytes]], said: str, tmp_path: Path) -> None:
    lines = journal(tmp_path)
    assert violations(parse(line, "") for line in lines) == []
    wrong = violations(parse(line, "") for line in damage(lines))
    assert any(said in each for each in wrong)


def test_tokens_that_do_not_grow_are_seen(tmp_path: Path) -> None:
    entries = [json.loads(line) for line in journal(tmp_path)]
    first, last = (entry["fact"] for entry in entries if entry["fact"]["kind"] == "granted")
    last["token"] = first["token"]
    wrong = violations(parse(json.dumps(entry).encode(), "") for entry in entries)
    assert any("token" in each for each in wrong)
    assert not any(isinstance(parse(json.dumps(e).encode(), "").fact, Freed) for e in entries[:3])


def test_threads_of_one_process_share_a_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    requests = [replace(ONE, id=str(number), devices=(f"d{number}",), count=1) for number in range(20)]
    threads = [threading.Thread(target=ledger.act, args=(ask(request),)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(ledger.state()[0].held) == 20
    assert violations(read(tmp_path / JOURNAL)) == []


def test_a_drained_lab_host_grants_nothing_and_what_is_held_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.act(ask(replace(ONE, devices=("a",), count=1)))
    ledger.act(protocol.drain("ann", "new hub"))
    state = ledger.act(ask(replace(ONE, id="2", devices=("a", "b"), count=1)))
    assert [held.device for held in state.of("1")] == ["a"]
    assert state.of("2") == ()
    (told, _) = protocol.why_not(state, "2", ledger.state()[1], RULES)
    assert told == "a is at a lab host that is drained by ann: new hub"
    with pytest.raises(LeaseError, match="drained by ann: new hub"):
        ledger.act(ask(replace(ONE, id="3", devices=("c",), count=1), wait=False))
    again = Ledger(tmp_path)
    assert again.state()[0].drained == "by ann: new hub"
    assert [held.device for held in again.act(protocol.drain("bob", "")).of("2")] == ["b"]
    assert violations(read(ledger.path)) == []


def test_the_checker_sees_a_grant_while_drained(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.act(protocol.drain("ann", "new hub"))
    ledger.act(ask(ONE))
    with ledger._writing():
        ledger._write((Granted("1", ledger._state.token + 1, ("a", "b")),))
    assert violations(read(ledger.path)) == ["line 4: 1 is granted while the lab host is drained"]
