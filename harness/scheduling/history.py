"""How long tests took in earlier runs: what longest-first stands on."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from harness.handover import Planned
from harness.store.protocol import Durations, Store

RUNS = 5  # the newest; older ones ran another engine


class History:
    """Of some runs. What was never run is expected to take as long as the median test."""

    def __init__(self, known: Durations) -> None:
        checks: dict[tuple[str, ...], list[float]] = defaultdict(list)
        legs: dict[str, list[float]] = defaultdict(list)
        for device, recipe, check, seconds in known.checks:
            for key in ((device, recipe, check), (recipe, check), (check,)):
                checks[key].append(seconds)
        for device, seconds in known.legs:
            legs[device].append(seconds)
        self._checks = {key: statistics.median(each) for key, each in checks.items()}
        self._legs = {key: statistics.median(each) for key, each in legs.items()}
        medians = [*self._checks.values(), *self._legs.values()]
        self._usual = statistics.median(medians) if medians else 1.0

    @classmethod
    def of(cls, store: Store, model: str) -> History:
        """Of the newest runs of a model. Raises StoreError."""
        return cls(store.durations(model, RUNS))

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
