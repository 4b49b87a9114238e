"""What is asked of a store: statements that use its indexes, and rows as people and reports want them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, case, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute

from harness.errors import StoreError
from harness.store.protocol import (
    UNITS,
    Checked,
    Durations,
    Flakes,
    GateCellRow,
    GateSummary,
    HistoryRow,
    Part,
    RunSummary,
    Span,
    Validity,
)
from harness.store.rows import CANARY, load
from harness.store.tables import Check, Device, Gate, GateCell, Leg, Measured, Run, SpanRow, Tag
from reports.results import CheckResult, DeviceInfo, LegResult, VitalsInfo

Chosen = dict[Any, str | None]  # by column: what it must be
NEWEST = (Run.started_at.desc(), Run.seq.desc())
_VALIDITIES: tuple[Validity, ...] = ("VALID", "NOISY", "INVALID")  # the best first
_STREAM = {"yield_per": 1000}  # rows are taken from the server as they are needed


class When(NamedTuple):
    """Which runs: see harness.store.protocol.Store.history."""

    since: str | None
    until: str | None
    newest: int | None


def tags(connection: Connection) -> dict[str, tuple[str, ...]]:
    """Of every run that has any, in the order in which it got them."""
    found: dict[str, tuple[str, ...]] = {}
    for run_id, name in connection.execute(select(Tag.run_id, Tag.name).order_by(Tag.seq)):
        found[run_id] = (*found.get(run_id, ()), name)
    return found


def run_summaries(connection: Connection) -> tuple[RunSummary, ...]:
    def counts(statement: Any) -> dict[str, tuple[int, ...]]:
        return {row[0]: tuple(row[1:]) for row in connection.execute(statement)}

    failed = func.sum(case((Check.outcome.in_(("passed", "not_supported")), 0), else_=1))
    checks = counts(select(Check.run_id, func.count(), failed).group_by(Check.run_id))
    devices = counts(select(Device.run_id, func.count()).group_by(Device.run_id))
    legs = counts(select(Leg.run_id, func.count()).group_by(Leg.run_id))
    tagged = tags(connection)
    runs = (
        select(Run.run_id, Run.started_at, Run.finished_at, Run.model, Run.command, Run.drill, Gate.verdict)
        .outerjoin(Gate, Gate.run_id == Run.run_id)
        .order_by(*NEWEST)
    )
    return tuple(
        RunSummary(
            run_id=run.run_id,
            started_at=run.started_at,
            finished_at=run.finished_at,
            model=run.model,
            command=run.command,
            devices=devices.get(run.run_id, (0,))[0],
            checks=checks.get(run.run_id, (0, 0))[0],
            failed=checks.get(run.run_id, (0, 0))[1],
            legs=legs.get(run.run_id, (0,))[0],
            verdict=run.verdict,
            drill=run.drill,
            tags=tagged.get(run.run_id, ()),
        )
        for run in connection.execute(runs)
    )


def history(
    connection: Connection,
    chosen: Chosen,
    metric: str | None,
    when: When,
    limit: int | None,
) -> tuple[HistoryRow, ...]:
    """chosen: columns of Measured."""
    metrics = [name for name in UNITS if metric in (None, name)]
    if not metrics:
        raise StoreError(f"sought one of the metrics {', '.join(UNITS)}, found {metric!r}")
    names = ("device", "recipe", "model", "workload", "arm", "artifact", "code", "validity", *metrics)
    statement = (
        select(Run.started_at, Run.run_id, *(getattr(Measured, name) for name in names))
        .join(Measured, Measured.run_id == Run.run_id)
        .where(Run.drill == "", Measured.arm != CANARY, *_matching(chosen), *_since(when.since))
        .order_by(*NEWEST, Measured.seq)
    )
    if when.until is not None:
        statement = statement.where(Run.started_at <= when.until)
    if when.newest is not None:
        statement = _newest(statement, when.newest)
    if len(metrics) == 1:
        statement = statement.where(getattr(Measured, metrics[0]).is_not(None))
    tagged = tags(connection)
    # PostgreSQL plans a stream for its first tenth (cursor_tuple_fraction): right only where we stop early.
    options = _STREAM if limit is not None else {}
    with connection.execution_options(**options).execute(statement) as rows:
        return tuple(islice(_points(rows, metrics, tagged), limit))


def _newest(statement: Select[Any], count: int) -> Select[Any]:
    """Of ``statement``, over Run and Measured, what the newest ``count`` runs say of each cell."""
    cell = (Measured.device, Measured.recipe, Measured.model, Measured.workload, Measured.arm)
    place = func.dense_rank().over(partition_by=cell, order_by=NEWEST)
    ranked = statement.with_only_columns(Measured.seq, place.label("place")).order_by(None).subquery()
    return statement.join(ranked, ranked.c.seq == Measured.seq).where(ranked.c.place <= count)


def checks(connection: Connection, device: str, recipe: str, model: str) -> Checked | None:
    of_cell = Check.device == device, Check.recipe == recipe
    newest = (
        select(Run.run_id, Run.started_at, Run.code)
        .where(Run.model == model, Run.drill == "")
        .where(select(Check.seq).where(Check.run_id == Run.run_id, *of_cell).exists())
        .order_by(*NEWEST)
        .limit(1)
    )
    run = connection.execute(newest).first()
    if run is None:
        return None
    payloads = select(Check.payload).where(Check.run_id == run.run_id, *of_cell).order_by(Check.seq)
    found = tuple(load(CheckResult, payload) for payload in connection.scalars(payloads))
    return Checked(run.run_id, run.started_at, run.code, found)


def durations(connection: Connection, model: str, runs: int) -> Durations:
    newest = (
        select(Run.run_id)
        .where(Run.model == model, Run.finished_at.is_not(None))
        .order_by(*NEWEST)
        .limit(runs)
    )
    checks = select(Check.device, Check.recipe, Check.name, Check.payload).where(
        Check.run_id.in_(newest), Check.outcome.in_(("passed", "failed"))
    )
    legs = select(Leg.payload).where(Leg.run_id.in_(newest))
    # To make results of these payloads would take eight times as long.
    return Durations(
        tuple((*names, json.loads(payload)["seconds"]) for *names, payload in connection.execute(checks)),
        tuple(_timed(json.loads(payload)) for payload in connection.scalars(legs)),
    )


def _timed(leg: dict[str, Any]) -> tuple[str, float]:
    """A leg's device, and the seconds of it that were timed."""
    repeats = sum(sample["ttft_ms"] + sum(sample["itl_ms"]) for sample in leg["samples"])
    return leg["device"], (leg["load_ms"] + repeats) / 1e3


def canaries(connection: Connection, device: str | None) -> dict[tuple[str, str], float]:
    statement = select(Measured.run_id, Measured.device, Measured.decode).where(
        Measured.arm == CANARY, *_matching({Measured.device: device})
    )
    found: dict[tuple[str, str], list[float]] = {}
    for run_id, name, decode in connection.execute(statement):
        if decode is not None:
            found.setdefault((run_id, name), []).append(decode)
    return {key: statistics.median(values) for key, values in found.items()}


def _points(
    rows: Iterable[Any], metrics: list[Any], tagged: dict[str, tuple[str, ...]]
) -> Iterator[HistoryRow]:
    """rows: one a leg, those of a run together."""
    for (at, run_id), legs in groupby(rows, key=itemgetter(0, 1)):
        cells: dict[tuple[str, ...], list[Any]] = {}
        for leg in legs:
            cells.setdefault(leg[2:9], []).append(leg)
        run_tags = tagged.get(run_id, ())
        for (device, recipe, model, workload, arm, artifact, code), found in cells.items():
            best_first = [(each, [leg for leg in found if leg[9] == each]) for each in _VALIDITIES]
            for index, metric in enumerate(metrics, 10):
                for validity, of in best_first:
                    if values := [leg[index] for leg in of if leg[index] is not None]:
                        yield HistoryRow(
                            at,
                            run_id,
                            device,
                            recipe,
                            model,
                            workload,
                            metric,
                            statistics.median(values),
                            UNITS[metric],
                            validity,
                            len(values),
                            arm,
                            artifact,
                            code,
                            run_tags,
                        )
                        break


def gates(
    connection: Connection, kind: str | None, since: str | None, limit: int | None
) -> tuple[GateSummary, ...]:
    names = ("kind", "baseline", "candidate", "verdict", "exit_code", "planned_cells", "aa")
    of_run = (Run.started_at, Run.run_id, Run.finished_at, Run.model, Run.drill)
    statement = (
        select(*of_run, *(getattr(Gate, n) for n in names))
        .join(Gate, Gate.run_id == Run.run_id)
        .where(*_since(since))
    )
    if kind is not None:
        statement = statement.where(Gate.kind == kind)
    tagged = tags(connection)
    return tuple(
        GateSummary(
            at=row.started_at,
            run_id=row.run_id,
            finished_at=row.finished_at,
            model=row.model,
            drill=row.drill,
            tags=tagged.get(row.run_id, ()),
            **{name: getattr(row, name) for name in names},
        )
        for row in connection.execute(statement.order_by(*NEWEST).limit(limit))
    )


def gate_cells(
    connection: Connection,
    chosen: Chosen,
    aa: bool | None,
    since: str | None,
    limit: int | None,
) -> tuple[GateCellRow, ...]:
    """chosen: columns of GateCell."""
    names = [
        name for name in GateCellRow.__dataclass_fields__ if hasattr(GateCell, name) and name != "run_id"
    ]
    statement = (
        select(Run.started_at, Run.run_id, Gate.kind, *(getattr(GateCell, n) for n in names), Run.drill)
        .join(Gate, Gate.run_id == Run.run_id)
        .join(GateCell, GateCell.run_id == Run.run_id)
        .where(*_matching(chosen), *_since(since))
    )
    if aa is not None:
        statement = statement.where(GateCell.aa.is_(aa))
    tagged = tags(connection)
    rows: Any = connection.execute(statement.order_by(*NEWEST, GateCell.seq).limit(limit))
    return tuple(GateCellRow(*(*row, tagged.get(row.run_id, ()))) for row in rows)


def spans(connection: Connection, run_id: str) -> tuple[Span, ...]:
    statement = select(SpanRow).where(SpanRow.run_id == run_id).order_by(SpanRow.seq)
    return tuple(
        Span(
            row.device,
            row.kind,
            row.name,
            row.began,
            row.ended,
            row.outcome,
            row.retries,
            load(tuple[Part, ...], row.payload),
        )
        for row in connection.execute(statement.with_only_columns(*SpanRow.__table__.columns))
    )


def flakes(connection: Connection, last: int) -> dict[str, Flakes]:
    place = func.row_number().over(partition_by=SpanRow.device, order_by=SpanRow.seq.desc())
    results = (
        select(SpanRow.device, SpanRow.outcome, SpanRow.retries, place.label("place"))
        .join(Run, Run.run_id == SpanRow.run_id)
        .where(SpanRow.kind.in_(("check", "leg")), Run.drill == "")
        .subquery()
    )
    stopped = case((or_(results.c.outcome == "infrastructure", results.c.retries > 0), 1), else_=0)
    statement = (
        select(results.c.device, func.count(), func.sum(stopped))
        .where(results.c.place <= last)
        .group_by(results.c.device)
    )
    return {device: Flakes(count, int(bad)) for device, count, bad in connection.execute(statement)}


def newest_devices(connection: Connection) -> dict[str, DeviceInfo]:
    newest = select(func.max(Device.seq)).group_by(Device.name)
    statement = select(Device.name, Device.payload).where(Device.seq.in_(newest))
    return {name: load(DeviceInfo, payload) for name, payload in connection.execute(statement)}


def vitals(connection: Connection) -> dict[str, VitalsInfo]:
    newest = select(func.max(Measured.seq)).group_by(Measured.device)
    payloads = connection.scalars(select(Leg.payload).where(Leg.seq.in_(newest)))
    return {leg.device: leg.vitals_after for leg in (load(LegResult, payload) for payload in payloads)}


def outcomes(connection: Connection) -> dict[tuple[str, str], int]:
    statement = select(Check.device, Check.outcome, func.count()).group_by(Check.device, Check.outcome)
    return {(device, outcome): count for device, outcome, count in connection.execute(statement)}


def _matching(chosen: Chosen) -> list[ColumnElement[bool]]:
    return [_matches(column, text) for column, text in chosen.items() if text is not None]


def _matches(column: InstrumentedAttribute[str], text: str) -> ColumnElement[bool]:
    """``column`` is ``text``, or like it where it has a ``*``."""
    if "*" not in text:
        return column == text
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return column.like(escaped.replace("*", "%"), escape="\\")


def _since(text: str | None) -> list[ColumnElement[bool]]:
    if text is None:
        return []
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise StoreError(
            f"sought a date like 2026-01-31 or a time like 2026-01-31T08:00, found {text!r}"
        ) from None
    at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
    return [Run.started_at >= at.isoformat(timespec="seconds")]
