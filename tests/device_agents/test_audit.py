"""Who did what: told by the lease journal, and still told when that has begun anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from device_agents.errors import LeaseError, LeaseNotGranted
from device_agents.leases import audit, protocol
from device_agents.leases import ledger as ledger_module
from device_agents.leases.audit import Event
from device_agents.leases.check import violations
from device_agents.leases.ledger import ARCHIVE, JOURNAL, Journal, Ledger, read
from device_agents.leases.model import Request, Rules

RULES = Rules()
ONE = Request("1", "ann", "ann@lab pid 7", ("a", "b"), 2, agent="agent", run="r1")


def ask(request: Request) -> protocol.Command:
    return protocol.ask(request, RULES, wait=True)


def told(folder: Path) -> list[Event]:
    return [replace(event, when="") for event in audit.events(audit.entries(folder))]


def work(ledger: Ledger) -> list[Event]:
    """Some days of a lab, and what is to be told of them."""
    token = ledger.act(ask(ONE)).token
    ledger.act(protocol.end("a", token, "given back"))
    ledger.act(protocol.freed("a", token))
    ledger.act(protocol.beat("1", RULES))
    ledger.act(protocol.quarantine("b", "swollen", "eve@desk pid 9", 60.0))
    ledger.act(protocol.freed("b", token))
    ledger.act(protocol.restart("b", "reboot", "eve@desk pid 9", "it is silent", most=2))
    ledger.act(protocol.lift("b", "golden job"))
    lost = "b was quarantined by eve@desk pid 9: swollen"
    return [
        Event("", "leased", "a", "ann@lab pid 7", run="r1"),
        Event("", "leased", "b", "ann@lab pid 7", run="r1"),
        Event("", "released", "a", "ann@lab pid 7", "given back", "r1"),
        Event("", "quarantined", "b", "eve@desk pid 9", "swollen (for 60 s)"),
        Event("", "released", "b", "ann@lab pid 7", lost, "r1"),
        Event("", "reboot", "b", "eve@desk pid 9", "it is silent"),
        Event("", "lifted", "b", "golden job"),
    ]


def test_every_deed_is_told_once_with_who_and_why(tmp_path: Path) -> None:
    expected = work(Ledger(tmp_path))
    assert told(tmp_path) == expected
    assert violations(read(tmp_path / JOURNAL)) == []


def test_what_a_journal_that_began_anew_has_forgotten_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "LONGEST_BYTES", 1)  # anew with every command
    expected = work(Ledger(tmp_path))
    assert len(read(tmp_path / JOURNAL)) < len(expected)
    assert told(tmp_path) == expected


def test_a_crash_before_the_new_journal_counts_tells_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    expected = work(ledger)
    ledger_module._archive(ledger.path)  # and killed here
    with (tmp_path / ARCHIVE).open("ab") as file:
        file.write(b'{"at": 1.0, "whe')  # in the middle of a line
    monkeypatch.setattr(ledger_module, "LONGEST_BYTES", 1)
    Ledger(tmp_path).act()
    assert told(tmp_path) == expected


def test_no_more_restarts_of_a_device_than_a_day_allows_by_all_who_ask(tmp_path: Path) -> None:
    now = [1000.0]
    one, other = Ledger(tmp_path, clock=lambda: now[0]), Ledger(tmp_path, clock=lambda: now[0])
    for ledger in (one, other):
        ledger.act(protocol.restart("a", "reboot", "somebody", "silent", most=2))
    one.act(protocol.restart("a", "power-cycle", "somebody", "silent", most=1))
    with pytest.raises(LeaseError, match="reboot 2 times in the last 24 h, at most 2"):
        one.act(protocol.restart("a", "reboot", "somebody", "silent", most=2))
    one.act(protocol.restart("b", "reboot", "somebody", "silent", most=2))
    now[0] += 24 * 3600
    one.act(protocol.restart("a", "reboot", "somebody", "silent", most=2))


def test_a_device_in_quarantine_is_lent_to_who_repairs_it_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.act(protocol.quarantine("a", "silent", "somebody", None))
    request = Request("1", "ann", "ann", ("a",))
    with pytest.raises(LeaseNotGranted, match="quarantined"):
        ledger.act(protocol.ask(request, RULES, wait=False))
    ledger.act(protocol.ask(replace(request, id="2", repair=True), RULES, wait=False))
    with pytest.raises(LeaseNotGranted, match="leased to 'ann'"):
        ledger.act(protocol.ask(replace(request, id="3", repair=True), RULES, wait=False))
    assert violations(read(tmp_path / JOURNAL)) == []


def test_whoever_only_reads_the_journal_makes_and_locks_nothing(tmp_path: Path) -> None:
    reader = Journal(tmp_path / "leases")
    assert reader.state()[0].held == {}
    assert not (tmp_path / "leases").exists()
    Ledger(tmp_path / "leases").act(ask(ONE))
    assert set(reader.state()[0].held) == {"a", "b"}


def test_how_long_was_waited(tmp_path: Path) -> None:
    now = [10.0]
    ledger = Ledger(tmp_path, clock=lambda: now[0])
    token = ledger.act(ask(ONE)).token
    ledger.act(ask(replace(ONE, id="2")))
    now[0] = 17.5
    ledger.act(protocol.withdraw("1", "done"))
    for device in ("a", "b"):
        ledger.act(protocol.freed(device, token))
    assert audit.waits(audit.entries(tmp_path)) == [0.0, 7.5]
