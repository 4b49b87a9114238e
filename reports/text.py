"""Numbers and counts as people read them. A missing or non-finite number is never shown as a number."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime

MISSING = "–"
_BYTE_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def slug(*parts: str) -> str:
    """Parts of a name as an anchor: ``Pixel 9``, ``int4`` give ``pixel-9-int4``. Not always unique."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)


def anchor(taken: set[str], *parts: str) -> str:
    """A slug that is not in ``taken`` yet; it is from then on. The same names give the same anchor."""
    name = wanted = slug(*parts)
    number = 2
    while name in taken:
        name, number = f"{wanted}-{number}", number + 1
    taken.add(name)
    return name


def plural(count: int, noun: str) -> str:
    """``1 check``, ``2 checks``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def joined(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def number(value: float | None) -> str:
    """Three significant digits, no exponent: ``1,240``, ``34.5``, ``0.123``."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def milliseconds(value: float | None) -> str:
    """A time in ms with its unit; seconds from ten seconds up."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{number(value / 1000)} s" if value >= 10_000 else f"{number(value)} ms"


def byte_size(value: float | None) -> str:
    """Binary units: ``26 MiB``, ``1.21 GiB``."""
    if value is None or not math.isfinite(value):
        return MISSING
    for unit, name in _BYTE_UNITS:
        if value >= unit:
            scaled = value / unit
            return f"{scaled:,.0f} {name}" if scaled == int(scaled) else f"{number(scaled)} {name}"
    return f"{value:.0f} B"


def error_size(value: float | None) -> str:
    """A logit error or a tolerance: ``3.1e-06``, ``0``, ``NaN``. None means that none was recorded."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    return "0" if value == 0 else f"{value:.1e}"


def seconds(value: float) -> str:
    """A duration: ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def moment(stamp: str) -> str:
    """An ISO 8601 stamp as ``23 Nov 2025, 14:06 UTC``; anything else comes back as it was."""
    try:
        at = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    if at.tzinfo is not None:
        at = at.astimezone(UTC)
    return f"{at.day} {at:%b %Y, %H:%M} UTC"


def day(stamp: str) -> str:
    """An ISO 8601 stamp as ``23 Nov 2025``; anything else comes back as it was."""
    return moment(stamp).split(",")[0]


def elapsed(start: str, end: str | None) -> str:
    """The time between two ISO 8601 stamps, "" if either cannot be read."""
    try:
        span = datetime.fromisoformat(end or "") - datetime.fromisoformat(start)
    except (ValueError, TypeError):
        return ""
    return seconds(span.total_seconds())
