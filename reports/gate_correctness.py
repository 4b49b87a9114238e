"""What the correctness suite said of a gate's candidate, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports import text
from reports.gate_results import CheckedInfo


@dataclass(frozen=True)
class CheckedRow:
    """tag: a class of style.css."""

    device: str
    recipe: str
    tag: str
    words: str
    failed: tuple[str, ...]
    share: str
    when: str
    run: str


def checked_rows(checked: Sequence[CheckedInfo], commit: str) -> tuple[CheckedRow, ...]:
    """commit: of the gate's kvfarm."""
    return tuple(_row(each, commit) for each in checked)


def remarks(checked: Sequence[CheckedInfo]) -> list[str]:
    """What a reader of a gate must know before they take "no worse" for "right"."""
    unknown = [each.device for each in checked if not each.total]
    wrong = [f"{len(each.failed)} of {each.total} on {each.device}" for each in checked if each.failed]
    found = (
        [f"Checks of the candidate that did not pass: {text.joined(wrong)} (see Is it right?)."]
        if wrong
        else []
    )
    if unknown:
        found.append(f"The candidate was never checked against the reference on {text.joined(unknown)}.")
    return found


def _row(each: CheckedInfo, commit: str) -> CheckedRow:
    if not each.total:
        return CheckedRow(
            each.device, each.recipe, "noisy", "never checked", (), text.MISSING, text.MISSING, ""
        )
    share = text.MISSING if each.worst_share is None else f"{100 * each.worst_share:.2g} %"
    same = bool(commit) and each.commit == commit and "+" not in commit
    code = "this commit" if same else f"commit {each.commit[:12] or 'unknown'}"
    return CheckedRow(
        each.device,
        each.recipe,
        "invalid" if each.failed else "valid",
        f"{each.passed} of {each.total}",
        each.failed,
        share,
        f"{text.moment(each.at)}, {code}",
        each.run_id,
    )
