"""The mutation score: would the checks have noticed?"""

from __future__ import annotations

from dataclasses import dataclass

from reports import text
from reports.results import RunResults


@dataclass(frozen=True)
class MutationView:
    """sentence: the score. remark: where and when it was measured, and whether that is this run's code.

    rows: number, name, source, found by, programs of each mutant. complete: all were found.
    """

    sentence: str
    remark: str
    complete: bool
    rows: tuple[tuple[str, str, str, str, str], ...]
    absent: tuple[tuple[str, str], ...]


def mutation_view(results: RunResults) -> MutationView | None:
    """None where no score was measured before the run."""
    score = results.mutation
    if score is None:
        return None
    total = len(score.mutants)
    sentence = f"{score.killed} of {total} known KV-cache bugs, each put into the engine alone, are found"
    if score.right_programs:
        sentence += f"; the engine as it is passes {score.right_programs:,} programs of the same checks"
    here = results.provenance.get("commit", "")
    same = bool(here) and here == score.commit and "+" not in here
    remark = f"Measured at commit {score.commit[:12] or 'unknown'}{'+changes' if '+' in score.commit else ''}"
    remark += f", {text.moment(score.started_at)}, on tiny models"
    remark += (
        "; this run is of the same commit."
        if same
        else f"; this run is of {here[:12] or 'an unknown commit'}."
    )
    rows = tuple(
        (str(m.number), m.name, m.source, m.killed_by or "nothing", str(m.examples)) for m in score.mutants
    )
    return MutationView(
        f"{sentence}.", remark, score.killed == total, rows, tuple(sorted(score.cannot_exist.items()))
    )
