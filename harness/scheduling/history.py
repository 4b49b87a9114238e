"""How long tests took in earlier runs: what longest-first stands on."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from harness.handover import Planned
from harness.store.protocol import Store
from reports.results import LegResult, RunResults

RUNS = 5  # the newest; older ones ran another engine


class History:
    """Of some runs. What was never run is expected to take as long as the median test."""

    def __init__(self, runs: Iterable[RunResults]) -> None:
        checks: dict[tuple[str, ...], list[float]] = defaultdict(list)
        legs: dict[str, list[float]] = defaultdict(list)
        for run in runs:
            for check in run.checks:
                if check.outcome in ("passed", "failed"):
                    for key in (
                        (check.device, check.recipe, check.check),
                        (check.recipe, check.check),
                        (check.check,),
                    ):
                        checks[key].append(check.seconds)
            for leg in run.legs:
                legs[leg.device].append(leg_seconds(leg))
        self._checks = {key: statistics.median(each) for key, each in checks.items()}
        self._legs = {key: statistics.median(each) for key, each in legs.items()}
        known = [*self._checks.values(), *self._legs.values()]
        self._usual = statistics.median(known) if known else 1.0

    @classmethod
    def of(cls, store: Store, model: str) -> History:
        """Of the newest runs of a model. Raises StoreError."""
        newest = [run for run in store.headers(finished=True, limit=10 * RUNS) if run.model == model]
        return cls(store.results(run.run_id) for run in newest[:RUNS])

    def seconds(self, test: Planned) -> float:
        """Expected of one test: of its device, else of any that ran it."""
        if test.kind == "measurement":
            return self._legs.get(test.device, self._usual)
        keys: Sequence[tuple[str, ...]] = (
            (test.device, test.recipe, test.check),
            (test.recipe, test.check),
            (test.check,),
        )
        found = next((self._checks[key] for key in keys if key in self._checks), self._usual)
        return found + (self._legs.get(test.device, 0.0) if test.kind == "both" else 0.0)


def leg_seconds(leg: LegResult) -> float:
    """What of a leg was timed: loading, and each repeat."""
    repeats = sum(sample.ttft_ms + sum(sample.itl_ms) for sample in leg.samples)
    return (leg.load_ms + repeats) / 1e3
