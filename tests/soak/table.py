"""A table as the soak and the chaos print it."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines; each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(w.ljust(width) for w, width in zip(row, widths, strict=True)).rstrip() for row in rows]
