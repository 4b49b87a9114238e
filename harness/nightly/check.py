"""Is it right? The correctness suite on every device, as ``kvfarm run`` does it."""

from __future__ import annotations

from pathlib import Path

from harness.nightly.parts import Found, Night
from harness.nightly.suite import checks, run_suite
from reports.gate_night import NightWord
from reports.verdict import verdict

_WORDS: dict[str, NightWord] = {"passed": "PASS", "failed": "WRONG"}


class Check:
    """A check that fails is a wrong answer; one that could not run is INVALID."""

    name, title, decides = "check", "Correctness", True

    def run(self, night: Night, folder: Path) -> Found:
        chosen = night.settings.check
        recipes = chosen.recipes or night.candidate.side.recipe
        extra = [f"--examples={chosen.examples}", *(["-k", chosen.only] if chosen.only else [])]
        results = run_suite(night, folder, checks(), recipes, extra)
        told = verdict(results)
        word = _WORDS.get(told.state, "INVALID")
        remarks = [f"Only the checks that {chosen.only!r} names were run."] if chosen.only else []
        return Found(word, told.headline, told.sentence, (*remarks, *told.remarks), results.run_id)
