"""The mutation score as data: what ``kvfarm mutants`` prints, and what later reports show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kvengine.codec import DecodeError, decode, encode
from reports.results import MutantInfo, MutationScore

FILE = "mutants.json"  # in the cache folder (.kvfarm)


def save(score: MutationScore, folder: Path) -> Path:
    """Write the score where later runs find it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(encode(score), indent=1) + "\n")
    partial.replace(path)
    return path


def load(folder: Path) -> MutationScore | None:
    """The score measured last; None where there is none, or one of another version."""
    try:
        return decode(MutationScore, json.loads((folder / FILE).read_text()), FILE)
    except (OSError, ValueError, DecodeError):
        return None


def only_by(mutants: Sequence[MutantInfo], net: str) -> dict[str, list[str]]:
    """The mutants that one property alone finds, apart from ``net``, which runs everything."""
    found: dict[str, list[str]] = {}
    for mutant in mutants:
        finders = {group(name) for name in (mutant.killed_by, *mutant.also) if name} - {net}
        if len(finders) == 1:
            found.setdefault(finders.pop(), []).append(mutant.name)
    return found


def group(name: str) -> str:
    """The property of a check: P7 of P7 and P7b."""
    return name.rstrip("b") if name[:1] == "P" and name[1:2].isdigit() else name
