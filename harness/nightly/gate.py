"""Candidate against baseline, as ``kvfarm gate`` does it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from harness.gate.outputs import write_gate_report
from harness.gate.plan import Plan, looks_up_to
from harness.gate.running import run_plan
from harness.nightly import drill
from harness.nightly.parts import Found, Night
from harness.tags import tags_of
from harness.trends import series_of_run
from reports import gate_view
from reports.gate_night import EXIT_CODES, NightWord
from reports.gate_results import GATE, Comparison, GateInfo
from reports.trend import Series, trend_view

_WORDS: dict[int, NightWord] = {code: word for word, code in EXIT_CODES.items()}


class Gate:
    """Other tokens than the baseline's are wrong answers; all else that is worse is REGRESSED."""

    name, title, decides = "gate", "Gate", True

    def run(self, night: Night, folder: Path) -> Found:
        settings = night.settings
        plan = Plan(
            kind="gate",
            baseline=night.baseline,
            candidate=night.candidate,
            comparisons=(Comparison(GATE, drill.injection(settings.drill)),),
            devices=night.devices,
            settings=night.rules,
            settings_from=night.rules_from,
            looks=looks_up_to(night.rules, settings.gate.blocks),
            seed=secrets.randbits(32),
            cache=night.cache,
            command=night.command,
            waivers=night.waivers,
            energy=settings.gate.energy,
            tags=tags_of(filter(None, [settings.tag])),
            drill=night.drill,
        )
        results = run_plan(plan, night.inventory, settings.farm_address, night.store, night.watcher)
        trend = series_of_run(night.store, results)
        write_gate_report(results, folder, trend)
        assert results.gate is not None
        word, told = word_of(results.gate), gate_view.summary(results.gate)
        headline = headline_of(results.gate, word)
        return Found(word, headline, told.sentence, (*told.remarks, *_news(trend)), results.run_id)


def headline_of(gate: GateInfo, word: NightWord) -> str:
    if word == "WRONG":
        return "The candidate answers otherwise than the baseline"
    if word == "REGRESSED" and gate.verdict != "REGRESSED":
        return "A waiver has expired"  # which fails a gate whatever else it found
    return gate_view.summary(gate).headline


def _news(trend: Sequence[Series]) -> tuple[str, ...]:
    """What changed its level in the last nights; it informs and never blocks."""
    view = trend_view(trend)
    return (f"Trend: {view.sentence}",) if view and any(cell.news for cell in view.cells) else ()


def word_of(gate: GateInfo) -> NightWord:
    """The gate's verdict, with wrong answers told from slower ones."""
    worse = [cell for cell in gate.cells if cell.gating and not cell.waived and cell.verdict == "REGRESSED"]
    if any(cell.metric == "tokens" for cell in worse):
        return "WRONG"
    return _WORDS[gate.exit_code]
