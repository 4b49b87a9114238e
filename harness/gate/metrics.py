"""What the gate compares of two legs. Every value is oriented so that more is worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reports.gate_results import Arm, Tail
from reports.results import LegResult

# MLPerf Inference's early stopping: the fewest queries from which a percentile may be told.
FLOORS = {"p50": (0.50, 1), "p90": (0.90, 64), "p99": (0.99, 662)}


@dataclass(frozen=True)
class Metric:
    """value: of one leg, None where the leg has none. margin: default; 0 for exact metrics.

    samples: ms, what tails are taken of. key: of an exact metric, what must be equal; None: no answer.
    weighed: its data are pairs of weighings (see harness.gate.weighing), not blocks.
    """

    name: str
    title: str
    unit: str
    value: Callable[[LegResult], float | None]
    margin: float = 0.0
    gates: bool = True
    exact: bool = False
    samples: Callable[[LegResult], list[float]] = lambda leg: []
    key: Callable[[LegResult], str | None] = lambda leg: None
    weighed: bool = False


def _ttft(leg: LegResult) -> list[float]:
    return [s.ttft_ms for s in leg.samples]


def _itl(leg: LegResult) -> list[float]:
    return [gap for s in leg.samples for gap in s.itl_ms]


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _tokens(leg: LegResult) -> str | None:
    return leg.place.tokens or None if leg.place else None


def _nodes(leg: LegResult) -> str | None:
    return ", ".join(f"{name}: {count}" for name, count in sorted(leg.nodes_by_provider.items())) or None


METRICS = {
    metric.name: metric
    for metric in (
        Metric("ttft", "Time to first token", "ms", lambda leg: _median(_ttft(leg)), 0.05, samples=_ttft),
        Metric("decode", "Inter-token latency", "ms", lambda leg: _median(_itl(leg)), 0.03, samples=_itl),
        Metric(
            "memory",
            "Peak memory",
            "bytes",
            lambda leg: float(leg.peak_rss_bytes) or None,
            0.02,
            weighed=True,
        ),
        Metric("energy", "Energy per token", "J", lambda leg: leg.energy.gross_j_per_token, 0.05),
        Metric("tokens", "Tokens", "", lambda leg: None, exact=True, key=_tokens),
        Metric(
            "kv_bytes",
            "KV cache",
            "bytes",
            lambda leg: float(leg.kv_bytes),
            exact=True,
            key=lambda leg: str(leg.kv_bytes),
        ),
        # A different recipe has a different graph; whoever compares equal graphs turns this on.
        Metric(
            "nodes",
            "Graph nodes",
            "",
            lambda leg: float(sum(leg.nodes_by_provider.values())),
            gates=False,
            exact=True,
            key=_nodes,
        ),
    )
}


def block_datum(
    metric: Metric, baseline: Sequence[LegResult], candidate: Sequence[LegResult]
) -> float | None:
    """log(candidate / baseline) of leg values, arms averaged in logs, so that linear drift cancels.

    None where a leg lacks the value.
    """
    logs = []
    for legs in (baseline, candidate):
        values = [metric.value(leg) for leg in legs]
        known = [math.log(value) for value in values if value is not None and value > 0]
        if not known or len(known) != len(values):
            return None
        logs.append(sum(known) / len(known))
    return logs[1] - logs[0]


def tails(metric: Metric, arm: Arm, legs: Sequence[LegResult]) -> tuple[Tail, ...]:
    """p50, p90 and p99 of all repeats of ``legs``; None below MLPerf's floors."""
    samples = [value for leg in legs for value in metric.samples(leg) if math.isfinite(value)]
    if not samples:
        return ()
    return tuple(
        Tail(
            arm,
            name,
            float(np.quantile(samples, q)) if len(samples) >= needed else None,
            len(samples),
            needed,
        )
        for name, (q, needed) in FLOORS.items()
    )
