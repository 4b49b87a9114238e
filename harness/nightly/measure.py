"""What the gate does not measure: other lengths, sustained runs, energy; to read, not to decide by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.nightly.parts import Found, Night
from harness.nightly.suite import MEASUREMENTS, run_suite
from reports.text import plural
from reports.verdict import count


class Measure:
    """A leg that is missing or INVALID is one that was planned and not measured."""

    name, title, decides = "measure", "Measurements", True

    def run(self, night: Night, folder: Path) -> Found:
        chosen = night.settings.measure
        extra = [
            f"--prompt={_joined(chosen.prompts)}",
            f"--new-tokens={_joined(chosen.new_tokens)}",
            f"--depth={_joined(chosen.depths)}",
            f"--repeats={chosen.repeats}",
            *([f"--sustained={chosen.sustained_s:g}"] if chosen.sustained_s else []),
            *(["--energy"] if chosen.energy else []),
        ]
        recipes = chosen.recipes or night.candidate.side.recipe
        results = run_suite(night, folder, [MEASUREMENTS], recipes, extra)
        counts = count(results)
        told = f"{counts.measured - counts.invalid} of {plural(counts.planned_legs, 'leg')} measured"
        told += f", {counts.noisy} of them NOISY." if counts.noisy else "."
        lost = counts.legs_missing or counts.invalid or counts.errors or results.finished_at is None
        headline = "Not all that was planned was measured" if lost else "All that was planned was measured"
        remarks = tuple(f"Measurements: {error}" for error in results.infrastructure[:3])
        return Found("INVALID" if lost else "PASS", headline, told, remarks, results.run_id)


def _joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
