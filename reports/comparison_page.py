"""The page of two runs side by side: one HTML file whose charts are SVG."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from reports import svg, text
from reports.comparison import NOTABLE, Comparison, Ratio, Turned, compare
from reports.correctness import SYMBOLS, WORDS
from reports.devices import DeviceView, device_view
from reports.gate_view import percent, value
from reports.page import asset, environment, policy, script, write_page
from reports.results import RunResults

WIDEST = 0.25  # of the axis, to either side
WORDS_SHOWN = {
    "worse": ("failed", "✕", "worse"),
    "differs": ("failed", "✕", "differs"),
    "better": ("passed", "✓", "better"),
    "alike": ("none", "≈", "no clear change"),
    "equal": ("none", "=", "equal"),
    "too few": ("none", "?", "too few to say"),
}


@dataclass(frozen=True)
class SideView:
    """One run. ``name`` is as it was asked for."""

    letter: str
    name: str
    run_id: str
    model: str
    started: str
    finished: bool
    command: str


@dataclass(frozen=True)
class RatioRow:
    """One row of the table; strip is None where there is no interval to draw."""

    ratio: Ratio
    device: DeviceView
    a: str
    b: str
    change: str
    interval: str
    counts: str
    tone: str
    symbol: str
    word: str
    strip: Markup | None


@dataclass(frozen=True)
class TurnedRow:
    turned: Turned
    device: DeviceView
    tone: str
    before: str
    after: str


def render(a: RunResults, b: RunResults, names: tuple[str, str], folder: Path) -> Path:
    """Writes ``folder``/index.html, replacing an older one, and returns its path. Raises OSError."""
    return write_page(html(a, b, names), folder)


def html(a: RunResults, b: RunResults, names: tuple[str, str] = ("", "")) -> str:
    """The page as text. names: what A and B were asked for by, e.g. tags."""
    found = compare(a, b)
    devices = {info.name: device_view(info) for info in (*a.devices, *b.devices)}
    scale = svg.Scale(-WIDEST, WIDEST, 4, 296)
    scripts = [script("page.js")]
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            found=found,
            headline=headline(found),
            remarks=tuple(_remarks(a, b, devices.values())),
            sides=tuple(
                _side(letter, run, name) for letter, run, name in zip("AB", (a, b), names, strict=True)
            ),
            rows=[_row(ratio, devices, scale) for ratio in found.ratios],
            turned=[_turned(turned, devices) for turned in found.turned],
            axis=svg.strip_axis(scale),
            policy=policy(scripts),
            style=Markup(asset("style.css") + asset("gate.css") + asset("trend.css")),
            scripts=[Markup(script) for script in scripts],
        )
    )


def headline(found: Comparison) -> str:
    """``2 checks fail that did not fail before; of 24 numbers 3 got worse and none better``."""
    parts = []
    red = sum(turned.after == "failed" for turned in found.turned)
    if red:
        parts.append(
            f"{text.plural(red, 'check')} {'fails' if red == 1 else 'fail'} that did not fail before"
        )
    words = [ratio.word for ratio in found.ratios]
    worse, better = words.count("worse"), words.count("better")
    if not words:
        parts.append("no number can be compared")
    elif worse or better:
        moved = f"{worse or 'none'} got worse and {better or 'none'} better"
        parts.append(f"of {text.plural(len(words), 'number')} {moved}")
    else:
        parts.append(f"none of {text.plural(len(words), 'number')} moved clearly")
    said = "; ".join(parts)
    return said[0].upper() + said[1:]


def _side(letter: str, run: RunResults, name: str) -> SideView:
    return SideView(
        letter=letter,
        name=name or run.run_id,
        run_id=run.run_id,
        model=run.model,
        started=text.moment(run.started_at),
        finished=run.finished_at is not None,
        command=run.command,
    )


def _remarks(a: RunResults, b: RunResults, devices: Iterable[DeviceView]) -> Iterable[str]:
    if a.run_id == b.run_id:
        yield "Both sides are the same run."
    if a.model != b.model:
        yield f"The models have different names ({a.model}, {b.model})."
    for letter, run in zip("AB", (a, b), strict=True):
        if run.finished_at is None:
            yield f"{letter} did not finish: what is missing there is not proved."
    simulated = [device.name for device in devices if device.simulated]
    if simulated:
        yield f"Simulated: {text.joined(simulated)}. It says nothing about the speed of real devices."


def _row(ratio: Ratio, devices: dict[str, DeviceView], scale: svg.Scale) -> RatioRow:
    tone, symbol, word = WORDS_SHOWN[ratio.word]
    device, unit = ratio.cell[0], ratio.measure.unit
    interval = ""
    if ratio.low is not None and ratio.high is not None:
        interval = f"{percent(ratio.low).removesuffix(' %')} to {percent(ratio.high)}"
    drawn = None if ratio.measure.exact else svg.strip(ratio.low, ratio.high, ratio.change, NOTABLE, scale)
    return RatioRow(
        ratio=ratio,
        device=devices.get(device) or DeviceView(device, "", "", ()),
        a=value(ratio.a, unit),
        b=value(ratio.b, unit),
        change="equal" if ratio.word == "equal" else percent(ratio.change),
        interval=interval,
        counts=f"n {ratio.counts[0]} / {ratio.counts[1]} {ratio.over}" if ratio.over else "exact",
        tone=tone,
        symbol=symbol,
        word=word,
        strip=drawn,
    )


def _turned(turned: Turned, devices: dict[str, DeviceView]) -> TurnedRow:
    def shown(outcome: str) -> str:
        return f"{SYMBOLS[outcome]} {WORDS[outcome]}"  # type: ignore[index]

    device = devices.get(turned.device) or DeviceView(turned.device, "", "", ())
    return TurnedRow(turned, device, turned.after, shown(turned.before), shown(turned.after))
