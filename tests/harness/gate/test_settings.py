"""gate.toml and waivers.toml: what they mean, and what is refused with words that help."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from harness.gate import settings, waivers
from harness.gate.errors import GateSettingsError, WaiverError
from harness.gate.metrics import METRICS
from reports.gate_results import GateCell

TODAY = date(2026, 11, 24)
WAIVER = """
[[waivers]]
cell = "pixel8/*/ttft"
allowed = 0.08
owner = "mara"
reason = "a longer prefill for the larger vocabulary"
issue = "#123"
expires = 2026-12-20
"""
CELL = GateCell(
    id="pixel8/gemma/p128+n64/ttft",
    comparison="gate",
    device="pixel8",
    model="gemma",
    workload="p128+n64",
    metric="ttft",
    title="Time to first token",
    unit="ms",
    exact=False,
    gating=True,
    advisory="",
    margin=0.05,
    verdict="REGRESSED",
    reason="",
    estimate=0.06,
    low=0.05,
    high=0.07,
)


def written(tmp_path: Path, text: str, name: str = "gate.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_issue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rules, source = settings.load()
    assert source == "defaults"
    margins = {name: rules.of_cell(f"d/m/w/{name}", METRICS[name])[0] for name in METRICS}
    assert margins["decode"] == 0.03
    assert margins["ttft"] == margins["energy"] == 0.05
    assert margins["memory"] == 0.02
    assert (rules.looks, rules.alpha) == ((8, 16, 32), 0.01)


def test_the_last_rule_that_matches_a_cell_wins(tmp_path: Path) -> None:
    text = """
        [metrics.decode]
        margin = 0.04
        [[cells]]
        cell = "old-*/*/decode"
        margin = 0.10
        gates = false
        [[cells]]
        cell = "old-but-gold/*"
        gates = true
    """
    rules, _ = settings.load(written(tmp_path, text))
    decode = METRICS["decode"]
    assert rules.of_cell("new/m/w/decode", decode) == (0.04, True)
    assert rules.of_cell("old-phone/m/w/decode", decode) == (0.10, False)
    assert rules.of_cell("old-but-gold/m/w/decode", decode) == (0.10, True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("alpha = ", "is no gate.toml"),
        ("looks = [16, 8]", "rising numbers"),
        ("looks = [2, 8]", "from 4 up"),
        ("alpha = 0.5", "at most 0.1"),
        ("margins = 3", "unknown key 'margins'"),
        ("[metrics.speed]\nmargin = 0.03", "unknown 'speed'; there are ttft, decode"),
        ("[metrics.decode]\nmargin = 3.0", "3 % is 0.03"),
        ("[metrics.tokens]\nmargin = 0.1", "compared exactly"),
        ("[[workloads]]\nnew_tokens = 1", "new_tokens >= 2"),
        ("workloads = []", "at least one"),
        ("[entry]\nresume_c = 40.0", "resume_c <= battery_c"),
        ("[entry]\nwait_s = -1.0", "at least 0"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(GateSettingsError) as refusal:
        settings.load(written(tmp_path, text))
    assert told in str(refusal.value)
    assert "gate.toml" in str(refusal.value)


def test_settings_that_were_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(GateSettingsError, match="sought gate settings"):
        settings.load(tmp_path / "none.toml")


def test_the_command_line_changes_the_workloads(tmp_path: Path) -> None:
    rules, _ = settings.load(written(tmp_path, ""))
    changed = settings.with_workload(rules, 32, None, 5)
    assert [(w.name, w.repeats) for w in changed.workloads] == [("p32+n64", 5)]
    assert settings.with_workload(rules, None, None, None) == rules


@pytest.mark.parametrize("expires", ["2026-12-20", '"2026-12-20"'])
def test_a_waiver_lets_its_loss_through(tmp_path: Path, expires: str) -> None:
    text = WAIVER.replace("2026-12-20", expires)
    (waiver,) = waivers.load(written(tmp_path, text, "waivers.toml"), TODAY)
    assert waivers.covering(CELL, [waiver], TODAY) == waiver
    assert waivers.covering(replace(CELL, high=0.09), [waiver], TODAY) is None
    assert waivers.covering(replace(CELL, id="s24/gemma/p128+n64/ttft"), [waiver], TODAY) is None


def test_a_waiver_lets_nothing_through_that_was_not_measured(tmp_path: Path) -> None:
    found = waivers.load(written(tmp_path, WAIVER, "waivers.toml"), TODAY)
    lost = replace(CELL, verdict="INVALID", estimate=None, low=None, high=None)
    assert waivers.covering(lost, found, TODAY) is None


def test_a_waiver_ends_after_its_last_day(tmp_path: Path) -> None:
    (waiver,) = waivers.load(written(tmp_path, WAIVER, "waivers.toml"), TODAY)
    assert not waiver.expired(date(2026, 12, 20))
    assert waiver.expired(date(2026, 12, 21))
    assert waivers.covering(CELL, [waiver], date(2026, 12, 21)) is None


def test_waivers_say_what_became_of_them(tmp_path: Path) -> None:
    (waiver,) = waivers.load(written(tmp_path, WAIVER, "waivers.toml"), TODAY)
    assert [w.state for w in waivers.told([waiver], [waiver], TODAY)] == ["used"]
    assert [w.state for w in waivers.told([waiver], [], TODAY)] == ["unused"]
    assert [w.state for w in waivers.told([waiver], [], date(2027, 1, 1))] == ["expired"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("2026-12-20", "2026-12-25", "more than 30 days away"),
        ("2026-12-20", '"soon"', "sought a date like"),
        ('owner = "mara"', 'owner = " "', "owner is empty"),
        ('owner = "mara"', "", "needs 'owner'"),
        ("0.08", "8.0", "8 % is 0.08"),
        ("allowed", "allow", "unknown key 'allow'"),
        ("[[waivers]]", "[[waivers", "is no waivers.toml"),
    ],
)
def test_bad_waivers_are_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    with pytest.raises(WaiverError) as refusal:
        waivers.load(written(tmp_path, WAIVER.replace(old, new, 1), "waivers.toml"), TODAY)
    assert told in str(refusal.value)


def test_no_file_means_no_waiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert waivers.load(None, TODAY) == ()
    with pytest.raises(WaiverError, match="sought waivers"):
        waivers.load(tmp_path / "none.toml", TODAY)
