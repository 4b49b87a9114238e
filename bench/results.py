"""What the rounds say, as plain numbers, a table and one line of JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.ceiling import tokens_per_second
from bench.contestants import Run
from bench.quiet import QUIET

MB = 1e6


@dataclass(frozen=True)
class Standing:
    """One contestant and its rounds.

    correlation: Pearson's, of its logits after the prompt with the float32 reference's.
    top1: whether both name the same next token.
    """

    name: str
    block_size: int
    weight_bytes: int  # codes and scales read by a token
    ceiling: float  # tokens/s
    load_ms: float
    peak_rss_bytes: int
    correlation: float
    top1: bool
    runs: tuple[Run, ...]

    @property
    def ttft_ms(self) -> list[float]:
        return [run.ttft_ms for run in self.runs]

    @property
    def tokens_per_second(self) -> list[float]:
        return [run.tokens_per_second for run in self.runs]


@dataclass(frozen=True)
class Target:
    """A ratio of two engines, round by round, and where its median must lie.

    metric: a property of Standing. at_most, at_least: the bound; None is no bound.
    """

    name: str
    metric: str
    ours: str
    theirs: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def bound(self) -> str:
        if self.at_most is not None:
            return f"at most {self.at_most:.2f}"
        return "" if self.at_least is None else f"at least {self.at_least:.2f}"

    def met(self, median: float) -> bool:
        low = self.at_least is None or median >= self.at_least
        return low and (self.at_most is None or median <= self.at_most)


@dataclass(frozen=True)
class Spread:
    """Median, and the lowest and highest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError for no values."""
        if not values:
            raise ValueError("sought at least one value, found none")
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Bench:
    """One benchmark, whole.

    bandwidth: bytes/s. starts: of each round, in which set of fresh processes it ran, from 1.
    rounds_wanted: quiet rounds needed for a verdict.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    bandwidth: float
    engines: tuple[Standing, ...]
    starts: tuple[int, ...]
    targets: tuple[Target, ...]
    rounds_wanted: int

    def engine(self, name: str) -> Standing:
        return next(engine for engine in self.engines if engine.name == name)

    @property
    def quiet_rounds(self) -> list[int]:
        """Rounds in which nobody disturbed any engine."""
        rounds = range(len(self.engines[0].runs))
        return [r for r in rounds if all(engine.runs[r].elsewhere <= QUIET for engine in self.engines)]

    @property
    def valid(self) -> bool:
        """Enough quiet rounds; without them no target counts as met or missed."""
        return len(self.quiet_rounds) >= self.rounds_wanted

    @property
    def counted(self) -> list[int]:
        """The rounds that medians are over: the quiet ones, or all of them when there are too few."""
        return self.quiet_rounds if self.valid else list(range(len(self.engines[0].runs)))

    def values(self, engine: Standing, metric: str) -> list[float]:
        each: list[float] = getattr(engine, metric)
        return [each[r] for r in self.counted]

    def ratios(self, target: Target) -> list[float]:
        ours, theirs = (
            self.values(self.engine(name), target.metric) for name in (target.ours, target.theirs)
        )
        return [mine / other for mine, other in zip(ours, theirs, strict=True)]

    def met(self, target: Target) -> bool | None:
        """None: too noisy to say."""
        return target.met(statistics.median(self.ratios(target))) if self.valid else None


def agreement(logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> tuple[float, bool]:
    """Pearson correlation of two [vocab] rows, and whether they have the same argmax."""
    return float(np.corrcoef(logits, reference)[0, 1]), bool(logits.argmax() == reference.argmax())


def ceiling_text(bandwidth: float, threads: int, sizes: dict[str, int]) -> str:
    """bandwidth: bytes/s. sizes: bytes of weights that a token reads, by engine."""
    lines = [f"memory is read at {bandwidth / 1e9:.1f} GB/s by {threads} threads, so that at most"]
    for name, size in sizes.items():
        rate = tokens_per_second(bandwidth, size)
        lines.append(f"  {name:<28}{rate:6.1f} tokens/s, at {size / MB:.1f} MB of weights and scales a token")
    return "\n".join(lines)


def table_text(bench: Bench) -> str:
    """Every round, then medians with lowest and highest, then ratios with their verdicts."""
    names = [engine.name for engine in bench.engines]
    lines = ["", "time to first token, ms; then decode, tokens/s; * others used the machine, not counted"]
    lines.append("start round  " + "  ".join(f"{name:>26}" for name in names))
    for r in range(len(bench.engines[0].runs)):
        cells = [
            f"{engine.ttft_ms[r]:>17.0f} {engine.tokens_per_second[r]:>7.1f} " for engine in bench.engines
        ]
        mark = " " if r in bench.quiet_rounds else "*"
        lines.append(f"{bench.starts[r]:>5} {r + 1:>4} {mark} " + "  ".join(cells))
    lines += [
        "",
        f"{'median (lowest to highest)':<24}{'first token, ms':>24}{'tokens/s':>24}{'of ceiling':>11}",
    ]
    for engine in bench.engines:
        first = Spread.of(bench.values(engine, "ttft_ms")).text(0)
        rate = Spread.of(bench.values(engine, "tokens_per_second"))
        share = f"{rate.median / engine.ceiling:.0%}"
        lines.append(f"  {engine.name:<28}{first:>24}{rate.text(1):>24}{share:>11}")
    lines += ["", f"{'':<30}{'load, ms':>10}{'peak RSS, MB':>14}{'logits with float32':>24}"]
    for engine in bench.engines:
        top = "same token" if engine.top1 else "other token"
        sane = f"r {engine.correlation:.3f}, {top}"
        lines.append(
            f"  {engine.name:<28}{engine.load_ms:>10.0f}{engine.peak_rss_bytes / MB:>14.0f}{sane:>24}"
        )
    lines += ["", "ratios, round by round: median (lowest to highest)"]
    words = {True: "met", False: "MISSED", None: "too noisy to say"}
    for target in bench.targets:
        spread = Spread.of(bench.ratios(target))
        verdict = f"sought {target.bound}: {words[bench.met(target)]}" if target.bound else ""
        lines.append(f"  {target.name:<44}{spread.text(3):>24}   {verdict}".rstrip())
    if not bench.valid:
        found = f"{len(bench.quiet_rounds)} of {bench.rounds_wanted} quiet rounds"
        lines.append(
            f"NOISY: {found}; medians are over all rounds and decide nothing. Run on an idle machine."
        )
    return "\n".join(lines)


def json_line(bench: Bench) -> str:
    """The whole benchmark on one line; raises ValueError rather than write NaN or Infinity."""
    value = {
        "bench": "genai",
        "machine": bench.machine,
        "settings": bench.settings,
        "read_bandwidth_bytes_per_s": bench.bandwidth,
        "valid": bench.valid,
        "quiet_rounds": [r + 1 for r in bench.quiet_rounds],
        "rounds_wanted": bench.rounds_wanted,
        "starts": bench.starts,
        "engines": [_engine_json(bench, engine) for engine in bench.engines],
        "ratios": [_target_json(bench, target) for target in bench.targets],
    }
    return json.dumps(value, allow_nan=False)


def _engine_json(bench: Bench, engine: Standing) -> dict[str, Any]:
    rate = Spread.of(bench.values(engine, "tokens_per_second"))
    gaps = [gap for r in bench.counted for gap in engine.runs[r].itl_ms]
    return {
        "name": engine.name,
        "block_size": engine.block_size,
        "weight_bytes_per_token": engine.weight_bytes,
        "ceiling_tokens_per_s": engine.ceiling,
        "of_ceiling": rate.median / engine.ceiling,
        "load_ms": engine.load_ms,
        "peak_rss_bytes": engine.peak_rss_bytes,
        "ttft_ms": vars(Spread.of(bench.values(engine, "ttft_ms"))),
        "tokens_per_s": vars(rate),
        "itl_ms": {f"p{q}": float(np.percentile(gaps, q)) for q in (50, 95, 99)},
        # A constant row has no correlation.
        "correlation": engine.correlation if np.isfinite(engine.correlation) else None,
        "top1": engine.top1,
        "rounds": [
            {"ttft_ms": run.ttft_ms, "tokens_per_s": run.tokens_per_second, "elsewhere": run.elsewhere}
            for run in engine.runs
        ],
    }


def _target_json(bench: Bench, target: Target) -> dict[str, Any]:
    ratios = bench.ratios(target)
    return {
        "name": target.name,
        "ours": target.ours,
        "theirs": target.theirs,
        "rounds": ratios,
        **vars(Spread.of(ratios)),
        "at_most": target.at_most,
        "at_least": target.at_least,
        "met": bench.met(target),
    }
