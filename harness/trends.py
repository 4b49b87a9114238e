"""Lines over stored runs for the report's trend: the store's history, cell by cell.

Of a gate its candidate counts; what a calibration slowed down is in no history. Where the same run
measured the frozen canary on the device, times are divided by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from harness.store.protocol import HistoryMetric, HistoryRow, Store
from reports.results import RunResults
from reports.trend import Night, Series

NIGHTS = 90  # the newest that measured the cell
TITLES: dict[HistoryMetric, str] = {
    "ttft": "TTFT",
    "decode": "ITL",
    "memory": "Peak memory",
    "energy": "Energy",
}  # tokens_per_s is ITL once more
TIMES: tuple[HistoryMetric, ...] = ("ttft", "decode")  # what a slow device makes slow

Key = tuple[str, str, str, str, HistoryMetric]


def series_of_run(store: Store, run: RunResults) -> tuple[Series, ...]:
    """The cells that ``run`` measured, up to it; of a gate the candidate's."""
    of = [leg for leg in run.legs if leg.place is None or leg.place.arm == "candidate"]
    cells = {(leg.device, leg.recipe, leg.model, leg.workload) for leg in of}
    rows: list[HistoryRow] = []
    for device in dict.fromkeys(leg.device for leg in of):
        rows += store.history(device=device, until=run.started_at, newest=NIGHTS)
    return _series(store, [row for row in rows if _key(row)[:4] in cells])


def series_of_store(store: Store, device: str | None = None, model: str | None = None) -> tuple[Series, ...]:
    """Every cell, or those of a device or model; ``*`` in their names stands for anything."""
    return _series(store, store.history(device=device, model=model, newest=NIGHTS))


def _series(store: Store, rows: Iterable[HistoryRow]) -> tuple[Series, ...]:
    """rows: newest first."""
    cells: dict[Key, list[HistoryRow]] = {}
    for row in rows:
        if row.metric in TITLES and row.arm != "baseline" and len(cells.get(_key(row), ())) < NIGHTS:
            cells.setdefault(_key(row), []).append(row)

    canaries: dict[tuple[str, str], float] = {}
    for device in dict.fromkeys(key[0] for key in cells):
        canaries |= store.canaries(device)
    devices = cache(store.devices)

    def simulated(name: str, run_id: str) -> str:
        return next((info.simulated for info in devices(run_id) if info.name == name), "")

    return tuple(
        Series(
            device=name,
            recipe=recipe,
            model=model,
            workload=workload,
            metric=TITLES[metric],
            unit=found[0].unit,
            nights=tuple(
                Night(
                    run_id=row.run_id,
                    at=row.at,
                    value=row.value,
                    valid=row.validity == "VALID",
                    canary=canaries.get((row.run_id, name)) if row.arm and metric in TIMES else None,
                    tags=row.tags,
                )
                for row in reversed(found)
            ),
            simulated=simulated(name, found[0].run_id),
        )
        for (name, recipe, model, workload, metric), found in cells.items()
    )


def _key(row: HistoryRow) -> Key:
    return (row.device, row.recipe, row.model, row.workload, row.metric)
