"""A gate in words and rows: what its page, its Markdown and the terminal show. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from reports import gate_correctness, text
from reports.gate_results import CalibrationInfo, GateCell, GateInfo, GateVerdict

SYMBOLS: dict[GateVerdict, str] = {"PASS": "✓", "REGRESSED": "✕", "INCONCLUSIVE": "?", "INVALID": "∅"}
# Class names of style.css. Nothing but PASS is green.
TONES: dict[GateVerdict, str] = {
    "PASS": "passed",
    "REGRESSED": "failed",
    "INCONCLUSIVE": "infrastructure",
    "INVALID": "not_run",
}
ORDER: tuple[GateVerdict, ...] = ("REGRESSED", "INVALID", "INCONCLUSIVE", "PASS")
MOST_NAMED = 3  # cells in the verdict's sentence


@dataclass(frozen=True)
class GateRow:
    """One cell as shown. ``word`` is its verdict, or "waived"; tone: a class of style.css."""

    cell: GateCell
    anchor: str
    symbol: str
    word: str
    tone: str
    baseline: str
    candidate: str
    change: str  # "+0.3 %"
    interval: str  # "−0.5 to +1.1 %"
    margin: str
    blocks: str
    name: str  # of the cell, without what all share


@dataclass(frozen=True)
class GateSummary:
    """passed etc. count gating cells; planned and measured all of them."""

    word: str
    tone: str  # of the verdict: passed, failed, interrupted or incomplete
    symbol: str
    headline: str
    sentence: str
    remarks: tuple[str, ...]
    counts: dict[GateVerdict, int]
    gating: int
    waived: int
    planned: int
    measured: int
    advisory: int


def rows(gate: GateInfo) -> tuple[GateRow, ...]:
    """Gating cells first, the worst first; else in the order in which they were planned."""
    indexed = [(f"c{number}", cell) for number, cell in enumerate(gate.cells)]
    ordered = sorted(
        indexed, key=lambda pair: (not pair[1].gating, bool(pair[1].waived), ORDER.index(pair[1].verdict))
    )
    return tuple(_row(anchor, cell, gate) for anchor, cell in ordered)


def summary(gate: GateInfo, finished: bool = True) -> GateSummary:
    """The verdict sentence, and planned against measured."""
    gating = [cell for cell in gate.cells if cell.gating]
    counts: dict[GateVerdict, int] = dict.fromkeys(ORDER, 0)
    for cell in gating:
        counts[cell.verdict] += not cell.waived
    measured = sum(cell.verdict != "INVALID" for cell in gate.cells)
    expired = sum(waiver.state == "expired" for waiver in gate.waivers)
    waived = sum(bool(cell.waived) for cell in gating)
    verdict = gate.verdict
    if not finished:
        word, tone, symbol = "UNFINISHED", "interrupted", "‖"
    elif expired and verdict == "PASS":
        word, tone, symbol = "WAIVER EXPIRED", "failed", "✕"
    else:
        word, tone, symbol = (
            verdict,
            {"PASS": "passed", "REGRESSED": "failed"}.get(verdict, "incomplete"),
            SYMBOLS[verdict],
        )
    if word == "PASS" and waived:
        tone = "incomplete"
    return GateSummary(
        word=word,
        tone=tone,
        symbol=symbol,
        headline=_headline(gate, word, waived),
        sentence=_sentence(gate, counts, waived),
        remarks=tuple(_remarks(gate, measured, expired)),
        counts=counts,
        gating=len(gating),
        waived=waived,
        planned=gate.planned_cells,
        measured=measured,
        advisory=gate.planned_cells - len(gating),
    )


def percent(ratio: float | None, sign: bool = True) -> str:
    """``+1.2 %``; a figure space where it is too small to matter."""
    if ratio is None:
        return text.MISSING
    size = 100 * ratio
    digits = 2 if abs(size) < 0.1 else 1
    shown = f"{size:+.{digits}f}" if sign else f"{size:.{digits}f}"
    return f"{shown.replace('-', '−')} %"


def value(amount: float | None, unit: str) -> str:
    """In the metric's unit."""
    if amount is None:
        return text.MISSING
    if unit == "ms":
        return text.milliseconds(amount)
    if unit == "bytes":
        return text.byte_size(amount)
    return f"{text.number(amount) if amount != int(amount) else f'{int(amount):,}'} {unit}".strip()


def calibration_sentence(found: CalibrationInfo | None) -> str:
    """How often this gate is wrong here, with its interval."""
    if found is None:
        return "This gate was never calibrated here: how often it is wrong is not known (`kvfarm calibrate`)."
    if not found.trials:
        return "No A/A verdict was reached here yet: how often this gate is wrong is not known."
    rate = percent(found.false_regressed / found.trials, False)
    low, high = percent(found.false_low, False), percent(found.false_high, False)
    return (
        f"Of {text.plural(found.trials, 'A/A verdict')} in {text.plural(len(found.runs), 'run')}, "
        f"{found.false_regressed} called the same code REGRESSED: {rate}, 95 % interval {low} to {high}."
    )


def _row(anchor: str, cell: GateCell, gate: GateInfo) -> GateRow:
    interval = text.MISSING
    if cell.low is not None and cell.high is not None:
        interval = f"{percent(cell.low).removesuffix(' %')} to {percent(cell.high)}"
    several = len({other.comparison for other in gate.cells}) > 1
    parts = [cell.comparison] if several else []
    return GateRow(
        cell=cell,
        anchor=anchor,
        symbol="≈" if cell.waived else SYMBOLS[cell.verdict],
        word=f"{cell.verdict}, waived" if cell.waived else cell.verdict,
        tone="infrastructure" if cell.waived else TONES[cell.verdict],
        baseline=value(cell.baseline, cell.unit),
        candidate=value(cell.candidate, cell.unit),
        change=_change(cell),
        interval=interval,
        margin="exact" if cell.exact else percent(cell.margin, False),
        blocks=_blocks(cell),
        name=" · ".join([*parts, cell.device, cell.workload, cell.title]),
    )


def _change(cell: GateCell) -> str:
    if not cell.exact:
        return percent(cell.estimate)
    if cell.verdict == "INVALID":
        return text.MISSING
    if cell.estimate == 0.0:
        return "equal"
    return "differs" if cell.estimate is None else percent(cell.estimate)


def _blocks(cell: GateCell) -> str:
    if cell.exact:
        return text.MISSING
    count = str(len(cell.blocks))
    return f"{count} (+{cell.void} void)" if cell.void else count


def _headline(gate: GateInfo, word: str, waived: int) -> str:
    if word == "UNFINISHED":
        return "The gate did not finish"
    if word == "WAIVER EXPIRED":
        return "A waiver has expired"
    if gate.kind == "calibration":
        return {
            "PASS": "The gate finds no difference where there is none",
            "REGRESSED": "The gate calls the same code worse",
            "INCONCLUSIVE": "A/A goes on: more nights will tell"
            if gate.slots
            else "The same code could not be told from itself",
            "INVALID": "The gate could not be calibrated",
        }[gate.verdict]
    if word == "PASS" and waived:
        return f"The candidate passes with {text.plural(waived, 'waived loss').replace('losss', 'losses')}"
    return {
        "PASS": "The candidate is no worse than the baseline",
        "REGRESSED": "The candidate is worse than the baseline",
        "INCONCLUSIVE": "Not decided: a person has to",
        "INVALID": "Not all that was planned was measured",
    }[gate.verdict]


def _sentence(gate: GateInfo, counts: dict[GateVerdict, int], waived: int) -> str:
    total = sum(counts.values()) + waived
    what = "A/A cells" if gate.kind == "calibration" else "gating cells"
    if not total:
        return f"There are no {what}: nothing was decided."
    parts = [f"{count} {word}" for word, count in counts.items() if count]
    parts += [f"{waived} waived"] if waived else []
    tail = ""
    worst = [c for c in gate.cells if c.gating and not c.waived and c.verdict == gate.verdict != "PASS"]
    if worst:
        by_reason: dict[tuple[str, str, str], list[str]] = {}
        for cell in worst:
            by_reason.setdefault((cell.device, cell.workload, cell.reason), []).append(cell.title.lower())
        named = [f"{d} {w} {text.joined(titles)} ({why})" for (d, w, why), titles in by_reason.items()]
        named[MOST_NAMED:] = [f"{len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
        tail = f" {gate.verdict}: {text.joined(named)}."
    return f"Of {total} {what}: {text.joined(parts)}.{tail}"


def _remarks(gate: GateInfo, measured: int, expired: int) -> list[str]:
    remarks = []
    if measured < gate.planned_cells:
        remarks.append(f"{measured} of {gate.planned_cells} planned cells were measured.")
    revoked = sum(cell.advisory.startswith("failed A/A") for cell in gate.cells)
    if revoked:
        verb = "cell does" if revoked == 1 else "cells do"
        remarks.append(f"{revoked} {verb} not gate today: calibration took the right (see Calibration).")
    if expired:
        remarks.append(
            f"{text.plural(expired, 'waiver')} expired: renew or remove, until then the gate fails."
        )
    unused = sum(waiver.state == "unused" for waiver in gate.waivers)
    if unused:
        remarks.append(f"{text.plural(unused, 'waiver')} covered nothing: remove what is not needed.")
    void = sum(bool(block.reasons) for block in gate.blocks)
    if void:
        remarks.append(f"{void} of {text.plural(len(gate.blocks), 'block')} were void and decide nothing.")
    return [*remarks, *gate_correctness.remarks(gate.checked), *gate.notes]
