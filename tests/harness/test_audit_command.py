"""``kvfarm audit``: leases from the journal and waivers from the store, in one list."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from device_agents.leases.audit import Event
from harness import auditing, cli
from harness.errors import HarnessError
from harness.inventory import DeviceEntry, Inventory
from harness.lab import leases_folder
from harness.store import open_store
from reports.gate_results import WaiverInfo
from tests.harness.farm_sample import HOSTILE, RUN, make_journal
from tests.reports.gate_sample import sample_gate
from tests.reports.sample import HOST, LOST


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_journal(leases_folder())
    run = sample_gate()
    assert run.gate is not None
    waivers = (
        WaiverInfo(f"{HOST}/*/ttft", 0.08, "mara", "a larger vocabulary", "#123", "2026-12-20", "used"),
        WaiverInfo("*", 0.5, "eve", "nobody needed it", "#9", "2026-12-20", "unused"),
    )
    with open_store() as store:
        store.begin_run(dataclasses.replace(run, gate=dataclasses.replace(run.gate, waivers=waivers)))
    return tmp_path


def audit(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, str]]:
    assert cli.run(["audit", "--json", *arguments]) == 0
    found: list[dict[str, str]] = json.loads(capsys.readouterr().out)["events"]
    return found


def test_leases_quarantines_and_waivers_stand_in_one_list(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {(e["what"], e["device"], e["who"], e["run"]) for e in audit(capsys)}
    assert ("leased", HOST, "nightly@ci-3 pid 4711", RUN) in told
    assert ("quarantined", LOST, "mara@desk pid 12", "") in told
    assert [each[:3] for each in told if each[0] == "waived"] == [("waived", HOST, "mara")]


def test_it_is_asked_by_device_user_and_time(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {e["what"] for e in audit(capsys, f"--device={LOST}")} == {"quarantined"}
    assert {e["what"] for e in audit(capsys, "--user=mara")} == {"quarantined", "waived"}
    assert {e["what"] for e in audit(capsys, "--since=1d")} == {"leased", "quarantined"}
    assert audit(capsys, "--since=2126-01-01") == []
    with pytest.raises(HarnessError, match="sought a date"):
        auditing.chosen((), since="yesterday")


def test_a_phone_is_told_by_its_name_in_farm_toml() -> None:
    known = Inventory({"pixel8": DeviceEntry(kind="android", options={"serial": "39121FDJH000AB"})})
    event = Event("2026-01-01T00:00:00.000+00:00", "leased", "39121FDJH000AB", "ann")
    virtual = dataclasses.replace(event, device="virtual-1 of there")
    assert [deed.device for deed in auditing.at_host("lab", (event, virtual), known)] == [
        "pixel8",
        "virtual-1",
    ]


def test_what_a_device_said_commands_no_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" in HOSTILE
    assert cli.run(["audit"]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\\x1b[2J" in said.out
