"""The Store on SQLAlchemy: a SQLite file by default, a PostgreSQL database by URL."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError

from harness.errors import StoreError
from harness.provenance import without_password
from harness.store import reading
from harness.store.engine import attempts, open_engine, plainly, transaction
from harness.store.grouping import GroupCommit, Write
from harness.store.protocol import (
    Checked,
    Durations,
    Flakes,
    GateCellRow,
    GateKind,
    GateSummary,
    HistoryMetric,
    HistoryRow,
    RunSummary,
    Span,
)
from harness.store.rows import cell_columns, digest, dump, dump_leg, gate_columns, load, measured, run_columns
from harness.store.schema import prepare
from harness.store.tables import (
    Base,
    Check,
    Device,
    Gate,
    GateCell,
    Infrastructure,
    Leg,
    Measured,
    Run,
    SpanRow,
    Tag,
)
from reports.gate_results import GateInfo
from reports.results import CheckResult, DeviceInfo, LegResult, RunResults, VitalsInfo

DEFAULT_STORE = Path(".kvfarm") / "results.db"
T = TypeVar("T")
_INSERTS: dict[str, Callable[..., Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_MEASURED = insert(Measured.__table__)  # type: ignore[arg-type]


def open_store(where: str | Path | None = None) -> SqlStore:
    """The store at ``where``: a SQLAlchemy URL, a SQLite file's path, or None for DEFAULT_STORE.

    An older kvfarm's store is brought to this one's version.

    Raises:
        StoreError: it cannot be opened, or a newer version of kvfarm made it.
    """
    return SqlStore(url_of(where))


def url_of(where: str | Path | None) -> str:
    """``where``, see ``open_store``, as a SQLAlchemy URL."""
    text = str(where or DEFAULT_STORE)
    return text if "://" in text else f"sqlite:///{text}"


class SqlStore:
    """See harness.store.protocol.Store. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._writes = GroupCommit(self._commit)
        with plainly(f"open the store {without_password(url)}", url):
            self._engine = open_engine(url)
            try:
                prepare(self._engine, without_password(url))
            except BaseException:
                self._engine.dispose()
                raise

    # -- what is kept --------------------------------------------------------------------------

    def begin_run(self, run: RunResults) -> None:
        header = dataclasses.replace(
            run, devices=(), checks=(), legs=(), infrastructure=(), gate=None, tags=()
        )

        def keep(connection: Connection) -> None:
            row = run_columns(run) | {"payload": dump(header)}
            self._upsert(connection, Run, {"run_id": run.run_id}, row)
            _keep_gate(connection, run.run_id, run.gate)
            for name in run.tags:
                self._upsert(connection, Tag, {"run_id": run.run_id, "name": name}, {})

        self._do(f"keep run {run.run_id}", keep)

    def add_device(self, run_id: str, device: DeviceInfo) -> None:
        key = {"run_id": run_id, "name": device.name}
        self._keep(f"device {device.name} of run {run_id}", Device, key, {"payload": dump(device)})

    def add_check(self, run_id: str, check: CheckResult, span: Span | None = None) -> None:
        key = {"run_id": run_id, "device": check.device, "recipe": check.recipe, "name": check.check}
        row = {"outcome": check.outcome, "payload": dump(check)}

        def keep(connection: Connection) -> None:
            self._upsert(connection, Check, key, row)
            self._keep_span(connection, run_id, span)

        self._do(f"keep check {check.check} of run {run_id}", keep)

    def add_leg(self, run_id: str, leg: LegResult, span: Span | None = None) -> None:
        payload = dump_leg(leg)

        def keep(connection: Connection) -> None:
            row = {"run_id": run_id, "digest": digest(leg.key or payload), "payload": payload}
            # None: it is there already, and so is what it measured.
            seq = connection.scalar(_new_leg(self._engine.dialect.name), row)
            if seq is not None and (columns := measured(leg)) is not None:
                connection.execute(_MEASURED, {"seq": seq, "run_id": run_id, **columns})
            self._keep_span(connection, run_id, span)

        self._do(f"keep a leg of {leg.recipe} on {leg.device} of run {run_id}", keep)

    def add_infrastructure(self, run_id: str, message: str) -> None:
        key = {"run_id": run_id, "digest": digest(message)}
        self._keep(
            f"an infrastructure error of run {run_id}", Infrastructure, key, {"payload": dump(message)}
        )

    def add_span(self, run_id: str, span: Span) -> None:
        what = f"keep when {span.device} did {span.name}"
        self._do(what, lambda connection: self._keep_span(connection, run_id, span))

    def finish_run(self, run_id: str, finished_at: str) -> None:
        def keep(connection: Connection) -> None:
            of_run = update(Run).where(Run.run_id == run_id)
            if not connection.execute(of_run.values(finished_at=finished_at)).rowcount:
                raise _no_run(run_id, connection)

        self._do(f"finish run {run_id}", keep)

    def add_tag(self, run_id: str, tag: str) -> None:
        def keep(connection: Connection) -> None:
            if connection.scalar(select(Run.seq).where(Run.run_id == run_id)) is None:
                raise _no_run(run_id, connection)
            self._upsert(connection, Tag, {"run_id": run_id, "name": tag}, {})

        self._do(f"tag run {run_id}", keep)

    # -- what is asked -------------------------------------------------------------------------

    def results(self, run_id: str) -> RunResults:
        def read(connection: Connection) -> RunResults:
            found = _headers(connection, Run.run_id == run_id)
            if not found:
                raise _no_run(run_id, connection)
            return dataclasses.replace(
                found[0],
                devices=_payloads(connection, Device, run_id, DeviceInfo),
                checks=_payloads(connection, Check, run_id, CheckResult),
                legs=_payloads(connection, Leg, run_id, LegResult),
                infrastructure=_payloads(connection, Infrastructure, run_id, str),
            )

        return self._do(f"read run {run_id}", read, reads=True)

    def headers(
        self,
        *,
        kind: GateKind | None = None,
        aa: bool | None = None,
        plan_key: str | None = None,
        finished: bool | None = None,
        limit: int | None = None,
    ) -> tuple[RunResults, ...]:
        conditions = [Gate.kind == kind] if kind is not None else []
        conditions += [Gate.aa.is_(aa)] if aa is not None else []
        conditions += [Gate.plan_key == plan_key] if plan_key is not None else []
        if finished is not None:
            conditions.append(Run.finished_at.is_not(None) if finished else Run.finished_at.is_(None))
        return self._do("read the runs", lambda c: _headers(c, *conditions, limit=limit), reads=True)

    def runs(self) -> tuple[RunSummary, ...]:
        return self._do("list the runs", reading.run_summaries, reads=True)

    def find(self, name: str, commit: str = "") -> str | None:
        newest = select(Run.run_id).order_by(*reading.NEWEST).limit(1)
        tagged = newest.join(Tag, Tag.run_id == Run.run_id).where(Tag.name == name)
        ways = [newest.where(Run.run_id == name), tagged]
        ways += [newest.where(Run.code == commit)] if commit else []

        def read(connection: Connection) -> str | None:
            return next(filter(None, map(connection.scalar, ways)), None)

        return self._do(f"find run {name}", read, reads=True)

    def latest(self) -> str:
        newest = select(Run.run_id).order_by(*reading.NEWEST).limit(1)
        found: str | None = self._do("find the newest run", lambda c: c.scalar(newest), reads=True)
        if found is None:
            raise StoreError(
                f"sought a run in {without_password(self._url)}, found none; start one with `kvfarm run`"
            )
        return found

    def history(
        self,
        *,
        device: str | None = None,
        recipe: str | None = None,
        model: str | None = None,
        workload: str | None = None,
        metric: HistoryMetric | None = None,
        since: str | None = None,
        until: str | None = None,
        newest: int | None = None,
        limit: int | None = None,
    ) -> tuple[HistoryRow, ...]:
        chosen: dict[Any, str | None] = {
            Measured.device: device,
            Measured.recipe: recipe,
            Measured.model: model,
            Measured.workload: workload,
        }
        when = reading.When(since, until, newest)
        return self._do(
            "read the history", lambda c: reading.history(c, chosen, metric, when, limit), reads=True
        )

    def checks(self, *, device: str, recipe: str, model: str) -> Checked | None:
        what = f"read the checks of {recipe} on {device}"
        return self._do(what, lambda c: reading.checks(c, device, recipe, model), reads=True)

    def durations(self, model: str, runs: int) -> Durations:
        what = f"read how long {model} took"
        return self._do(what, lambda c: reading.durations(c, model, runs), reads=True)

    def canaries(self, device: str | None = None) -> dict[tuple[str, str], float]:
        return self._do("read the canaries", lambda c: reading.canaries(c, device), reads=True)

    def devices(self, run_id: str) -> tuple[DeviceInfo, ...]:
        what = f"read the devices of run {run_id}"
        return self._do(what, lambda c: _payloads(c, Device, run_id, DeviceInfo), reads=True)

    def gates(
        self, *, kind: GateKind | None = None, since: str | None = None, limit: int | None = None
    ) -> tuple[GateSummary, ...]:
        return self._do("list the gates", lambda c: reading.gates(c, kind, since, limit), reads=True)

    def gate_cells(
        self,
        *,
        run_id: str | None = None,
        device: str | None = None,
        recipe: str | None = None,
        model: str | None = None,
        workload: str | None = None,
        metric: str | None = None,
        aa: bool | None = None,
        since: str | None = None,
        limit: int | None = None,
    ) -> tuple[GateCellRow, ...]:
        chosen: dict[Any, str | None] = {
            GateCell.run_id: run_id,
            GateCell.device: device,
            GateCell.recipe: recipe,
            GateCell.model: model,
            GateCell.workload: workload,
            GateCell.metric: metric,
        }
        return self._do(
            "read gates' cells", lambda c: reading.gate_cells(c, chosen, aa, since, limit), reads=True
        )

    def spans(self, run_id: str) -> tuple[Span, ...]:
        return self._do(f"read when run {run_id} did what", lambda c: reading.spans(c, run_id), reads=True)

    def flakes(self, last: int = 100) -> dict[str, Flakes]:
        return self._do("count what infrastructure stopped", lambda c: reading.flakes(c, last), reads=True)

    def newest_devices(self) -> dict[str, DeviceInfo]:
        return self._do("list the devices", reading.newest_devices, reads=True)

    def vitals(self) -> dict[str, VitalsInfo]:
        return self._do("read the newest vitals", reading.vitals, reads=True)

    def outcomes(self) -> dict[tuple[str, str], int]:
        return self._do("count checks", reading.outcomes, reads=True)

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> SqlStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- how -----------------------------------------------------------------------------------

    def _do(self, what: str, work: Callable[[Connection], T], *, reads: bool = False) -> T:
        """``work`` in one transaction, which may be tried again, and is shared with what other threads write
        meanwhile. what: for messages."""

        def once() -> T:
            with transaction(self._engine, reads=True) as connection:
                return work(connection)

        with plainly(what, self._url):
            if reads:
                return attempts(self._engine)(once)
            found: T = self._writes.do(work)
            return found

    def _commit(self, group: Sequence[Write]) -> None:
        """All of it, but for what fails by itself: that is undone alone, and the others stand."""

        def once() -> None:
            with transaction(self._engine) as connection:
                for write in group:
                    if len(group) == 1:
                        write.result = write.work(connection)
                        continue
                    write.error = None
                    try:
                        with connection.begin_nested():
                            write.result = write.work(connection)
                    except OperationalError:
                        raise  # the connection, not what was written
                    except Exception as error:
                        write.error = error

        attempts(self._engine)(once)

    def _keep_span(self, connection: Connection, run_id: str, span: Span | None) -> None:
        if span is None:
            return
        key = {"run_id": run_id, "device": span.device, "kind": span.kind, "name": span.name}
        row = {"ended": span.ended, "outcome": span.outcome, "retries": span.retries}
        row |= {"payload": dump(span.parts)}
        self._upsert(connection, SpanRow, key | {"began": span.began}, row)

    def _keep(self, what: str, table: type[Base], key: dict[str, Any], row: dict[str, Any]) -> None:
        self._do(f"keep {what}", lambda connection: self._upsert(connection, table, key, row))

    def _upsert(
        self, connection: Connection, table: type[Base], key: dict[str, Any], row: dict[str, Any]
    ) -> None:
        """One row for ``key``, whoever delivers it how often; its place in the order is the first one's."""
        statement = _upserting(self._engine.dialect.name, table, tuple(key), tuple(row))
        connection.execute(statement, key | row)


@cache
def _upserting(dialect: str, table: type[Base], key: tuple[str, ...], row: tuple[str, ...]) -> Any:
    """Made once: SQLAlchemy takes longer over a statement than a database over its row."""
    statement = _INSERTS[dialect](table.__table__)
    if not row:
        return statement.on_conflict_do_nothing()
    return statement.on_conflict_do_update(
        index_elements=list(key), set_={name: statement.excluded[name] for name in row}
    )


@cache
def _new_leg(dialect: str) -> Any:
    return _INSERTS[dialect](Leg.__table__).on_conflict_do_nothing().returning(Leg.__table__.c.seq)


def _keep_gate(connection: Connection, run_id: str, gate: GateInfo | None) -> None:
    """The run's gate as it stands, with its cells, in place of what it was after an earlier look."""
    for table in (GateCell, Gate):
        connection.execute(delete(table).where(table.run_id == run_id))
    if gate is None:
        return
    connection.execute(insert(Gate).values(run_id=run_id, payload=dump(gate), **gate_columns(gate)))
    if cells := cell_columns(gate):
        connection.execute(insert(GateCell), [{"run_id": run_id, **cell} for cell in cells])


def _headers(connection: Connection, *conditions: Any, limit: int | None = None) -> tuple[RunResults, ...]:
    statement = (
        select(Run.run_id, Run.payload, Run.finished_at, Gate.payload)
        .outerjoin(Gate, Gate.run_id == Run.run_id)
        .where(*conditions)
        .order_by(*reading.NEWEST)
        .limit(limit)
    )
    tagged = reading.tags(connection)
    return tuple(
        dataclasses.replace(
            load(RunResults, payload),
            finished_at=finished_at,
            gate=load(GateInfo, gate) if gate is not None else None,
            tags=tagged.get(run_id, ()),
        )
        for run_id, payload, finished_at, gate in connection.execute(statement)
    )


def _payloads(connection: Connection, table: Any, run_id: str, kind: type[T]) -> tuple[T, ...]:
    statement = select(table.payload).where(table.run_id == run_id).order_by(table.seq)
    return tuple(load(kind, payload) for payload in connection.scalars(statement))


def _no_run(run_id: str, connection: Connection) -> StoreError:
    known = list(connection.scalars(select(Run.run_id).order_by(Run.seq.desc()).limit(5)))
    return StoreError(
        f"sought run {run_id!r}, found {', '.join(known) or 'no runs'}; `kvfarm report --list` lists all"
    )
