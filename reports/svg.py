"""Small charts as inline SVG: no script, so they print, open from disk and need no library.

Colours are the CSS variables of style.css, so that they follow light, dark and print. Every chart
has a text alternative. Numbers in, Markup out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from markupsafe import Markup, escape


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


class Scale:
    """Values in [low, high] to pixels in [start, end]; what lies outside is put at the edge."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1.0
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self._start + share * (self._end - self._start), 1)


def picture(width: int, height: int, label: str, parts: Sequence[str], css: str = "") -> Markup:
    """An <svg> of ``parts``, which are SVG already; ``label`` is escaped here."""
    return Markup(
        f'<svg class="svg {css}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def strip(
    low: float | None, high: float | None, estimate: float | None, margin: float, scale: Scale
) -> Markup:
    """One row of a forest plot: the margin band, the interval, the estimate.

    Hidden from screen readers: the row around it says the same in words. A farm has hundreds.
    """
    height, middle = 26, 13
    left, zero, right = (round(scale(value)) for value in (-margin, 0, margin))
    parts = [
        f'<path class="band" d="M{left} 0H{right}V{height}H{left}z"/>',
        f'<path class="zero" d="M{zero} 0v{height}"/><path class="margin" d="M{right} 0v{height}"/>',
    ]
    if low is not None and high is not None:
        parts.append(f'<path class="whisker" d="M{scale(low)} {middle}H{scale(high)}"/>')
        # An arrow where the interval goes on beyond the axis.
        if high > scale.high:
            parts.append(f'<path class="dot" d="M{scale(high)} {middle}l-6 -4v8z"/>')
        if low < scale.low:
            parts.append(f'<path class="dot" d="M{scale(low)} {middle}l6 -4v8z"/>')
    if estimate is not None and scale.low <= estimate <= scale.high:
        parts.append(f'<circle class="dot" cx="{scale(estimate)}" cy="{middle}" r="5"/>')
    return Markup(
        f'<svg class="svg strip" viewBox="0 0 300 {height}" aria-hidden="true">{"".join(parts)}</svg>'
    )


def strip_axis(scale: Scale) -> Markup:
    """The axis above the strips, in per cent."""
    parts = []
    for tick in ticks(100 * scale.low, 100 * scale.high, 4):
        shown = f"{tick:+g} %".replace("-", "−") if tick else "0"
        parts.append(f'<text x="{scale(tick / 100)}" y="13" text-anchor="middle">{shown}</text>')
    return picture(300, 18, "change, worse to the right", parts, "strip axis")


def dots(points: Sequence[tuple[int, str, float, bool]], unit: str, label: str) -> Markup:
    """Legs by block. points: (block, arm, value, whether the block counts)."""
    width, height, left, bottom = 460, 200, 56, 22
    values = [value for _, _, value, _ in points]
    spread = (max(values) - min(values)) or abs(values[0]) * 0.02 or 1.0
    y = Scale(min(values) - 0.08 * spread, max(values) + 0.08 * spread, height - bottom, 8)
    blocks = sorted({block for block, *_ in points})
    x = Scale(-0.5, len(blocks) - 0.5, left, width - 6)
    place = {block: i for i, block in enumerate(blocks)}
    parts = _y_axis(y, left, width, unit)
    every = max(1, math.ceil(len(blocks) / 12))
    parts += [
        f'<text x="{x(i)}" y="{height - 6}" text-anchor="middle">{block + 1}</text>'
        for block, i in place.items()
        if i % every == 0
    ]
    offset = {"baseline": -0.16, "candidate": 0.16}
    for block, arm, value, counts in points:
        css = f"{arm}{'' if counts else ' void'}"
        parts.append(_mark(arm, css, x(place[block] + offset[arm]), y(value)))
    return picture(width, height, label, parts, "plotted")


def ecdf(arms: Sequence[tuple[str, Sequence[float]]], unit: str, label: str) -> Markup:
    """Share of samples at most so long, one line an arm."""
    width, height, left, bottom = 460, 200, 40, 22
    values = sorted(value for _, samples in arms for value in samples)
    low, high = values[0], values[min(len(values) - 1, math.ceil(0.99 * len(values)))]
    x = Scale(low, high, left, width - 8)
    y = Scale(0, 1, height - bottom, 8)
    parts = [
        f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y(s)}" y2="{y(s)}"/>'
        f'<text x="{left - 6}" y="{y(s) + 4}" text-anchor="end">{s:.0%}</text>'
        for s in (0, 0.5, 1)
    ]
    parts += [
        f'<text x="{x(tick)}" y="{height - 6}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks(low, high, 5)
    ]
    parts.append(f'<text x="{width - 8}" y="{height - 28}" text-anchor="end">{escape(unit)}</text>')
    for arm, samples in arms:
        ordered = sorted(samples)
        ranks = _ranks(len(ordered), 60)
        path = f"M{x(ordered[0])} {y(0)}"
        for rank in ranks:
            path += f"H{x(ordered[rank])}V{y((rank + 1) / len(ordered))}"
        parts.append(f'<path class="line {arm}" d="{path}"/>')
    return picture(width, height, label, parts, "plotted")


def curves(
    arms: Sequence[tuple[str, Sequence[tuple[float, float]]]], axes: tuple[str, str], label: str
) -> Markup:
    """One line an arm, with a mark at each point (x, y). axes: their titles. y begins at 0."""
    width, height, left, bottom = 460, 210, 56, 36
    points = [point for _, line in arms for point in line]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    x = Scale(low, high, left + 8, width - 14)
    y = Scale(0, 1.08 * max(value for _, value in points), height - bottom, 18)
    parts = _y_axis(y, left, width, axes[1])
    parts += [
        f'<text x="{x(tick)}" y="{height - bottom + 14}" text-anchor="middle">{tick:,g}</text>'
        for tick in ticks(low, high, 6)
    ]
    parts.append(f'<text x="{width - 14}" y="{height - 4}" text-anchor="end">{escape(axes[0])}</text>')
    for arm, line in arms:
        if line:
            route = "L".join(f"{x(at)} {y(value)}" for at, value in line)
            parts.append(f'<path class="line {arm}" d="M{route}"/>')
            parts += [_mark(arm, arm, x(at), y(value)) for at, value in line]
    return picture(width, height, label, parts, "plotted")


def _mark(arm: str, css: str, x: float, y: float) -> str:
    """A circle, for the candidate a triangle: colour alone tells nothing to one reader in twelve."""
    if arm == "baseline":
        return f'<circle class="{css}" cx="{x}" cy="{y}" r="3.6"/>'
    return f'<path class="{css}" d="M{x} {round(y - 4.6, 1)}l4.4 7.8h-8.8z"/>'


def spark(values: Sequence[float], marks: Sequence[int]) -> Markup:
    """A line without axes, for a table's row; ``marks``: indices of change points.

    Hidden from screen readers: the row says the same in words.
    """
    each = math.ceil(len(values) / 40)  # a page may have thousands: 3 px a point, whole pixels
    shown = [statistics.median(values[at : at + each]) for at in range(0, len(values), each)]
    y = Scale(min(shown), max(shown), 20, 4)
    x = Scale(0, max(1, len(shown) - 1), 2, 118)
    route = "L".join(f"{round(x(index))} {round(y(value))}" for index, value in enumerate(shown))
    parts = [f'<path class="line" d="M{route}"/>']
    parts += [f'<path class="zero" d="M{round(x(index / each))} 0v24"/>' for index in marks]
    return Markup(f'<svg class="svg spark" viewBox="0 0 120 24" aria-hidden="true">{"".join(parts)}</svg>')


def nights(
    points: Sequence[tuple[float, bool, str]],
    marks: Sequence[tuple[int, str]],
    tags: Sequence[tuple[int, str]],
    unit: str,
    label: str,
) -> Markup:
    """One value a night. points: (value, whether it counts, its words); oldest first.

    marks: (index, css class) of the first night at a new level; tags: (index, name) above the line.
    """
    width, height, left, bottom, top = 460, 200, 56, 22, 30
    values = [value for value, _, _ in points]
    spread = (max(values) - min(values)) or abs(values[0]) * 0.02 or 1.0
    y = Scale(min(values) - 0.1 * spread, max(values) + 0.1 * spread, height - bottom, top)
    x = Scale(-0.5, len(points) - 0.5, left, width - 6)
    parts = _y_axis(y, left, width, unit)
    parts += _tags(tags, x, height - bottom)
    for index, css in marks:
        at = round((x(index - 1) + x(index)) / 2, 1)
        parts.append(f'<path class="change {css}" d="M{at} {top - 6}V{height - bottom}m0 0l-5 7h10z"/>')
    counted = [(index, value) for index, (value, counts, _) in enumerate(points) if counts]
    if counted:
        route = "L".join(f"{x(index)} {y(value)}" for index, value in counted)
        parts.append(f'<path class="line" d="M{route}"/>')
    for index, (value, counts, words) in enumerate(points):
        css = "night" if counts else "night void"
        title = f"<title>{escape(words)}</title>"
        parts.append(f'<circle class="{css}" cx="{x(index)}" cy="{y(value)}" r="3">{title}</circle>')
    ends = ((0, "start"), (len(points) - 1, "end"))
    parts += [
        f'<text x="{x(index)}" y="{height - 6}" text-anchor="{anchor}">'
        f"{escape(points[index][2].split(':')[0])}</text>"
        for index, anchor in ends
    ]
    return picture(width, height, label, parts, "plotted")


def _tags(tags: Sequence[tuple[int, str]], x: Scale, floor: int) -> list[str]:
    """Thin lines with names; names that would run into the one before are left to the tooltip."""
    parts, free = [], 0.0
    for index, name in tags:
        at = x(index)
        shown = ""
        if at >= free:
            short = name if len(name) <= 14 else f"{name[:13]}…"
            # Towards the right edge the name stands left of its line.
            side = ("end", at - 3) if at > 380 else ("start", at + 3)
            shown = f'<text x="{side[1]}" y="22" text-anchor="{side[0]}">{escape(short)}</text>'
            free = at + 7 * len(short) + 8
        parts.append(
            f'<g class="tagged"><title>{escape(name)}</title><path d="M{at} 14V{floor}"/>{shown}</g>'
        )
    return parts


def _y_axis(y: Scale, left: int, width: int, unit: str) -> list[str]:
    parts = [
        f'<line class="grid" x1="{left}" x2="{width - 6}" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>'
        for tick in ticks(y.low, y.high, 4)
    ]
    parts.append(f'<text x="{left + 4}" y="14">{escape(unit)}</text>')
    return parts


def _ranks(count: int, most: int) -> list[int]:
    """Evenly spaced ranks in [0, count), the last one included."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
