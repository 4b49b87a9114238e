"""The Store on SQLAlchemy: a SQLite file by default, any other database by URL.

Each row holds one of reports.results' dataclasses as JSON text (text and not a JSON column: an
error may be NaN, which PostgreSQL's JSON refuses) beside the columns it is looked up by.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    Engine,
    ForeignKey,
    Integer,
    String,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

from harness.errors import StoreError
from harness.store.protocol import RunSummary
from kvengine.codec import DecodeError, decode, encode
from reports.results import CheckResult, DeviceInfo, LegResult, RunResults

DEFAULT_STORE = Path(".kvfarm") / "results.db"
SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30  # writers wait for each other: one commit takes milliseconds
T = TypeVar("T")


class _Base(DeclarativeBase):
    pass


class _Schema(_Base):
    __tablename__ = "kvfarm_schema"
    version: Mapped[int] = mapped_column(Integer, primary_key=True)


class _Row(_Base):
    """What every table has: the order of arrival and the payload."""

    __abstract__ = True
    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    payload: Mapped[str] = mapped_column(Text)


class _Run(_Row):
    __tablename__ = "runs"
    run_id: Mapped[str] = mapped_column(String(64), unique=True)
    started_at: Mapped[str] = mapped_column(String(40), index=True)
    model: Mapped[str] = mapped_column(String(255), index=True)
    finished_at: Mapped[str | None] = mapped_column(String(40))


class _Device(_Row):
    __tablename__ = "devices"
    __table_args__ = (UniqueConstraint("run_id", "name"),)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"))
    name: Mapped[str] = mapped_column(String(255))


class _Check(_Row):
    __tablename__ = "checks"
    __table_args__ = (UniqueConstraint("run_id", "device", "recipe", "name"),)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"))
    device: Mapped[str] = mapped_column(String(255), index=True)
    recipe: Mapped[str] = mapped_column(String(255))
    name: Mapped[str] = mapped_column(String(255))
    outcome: Mapped[str] = mapped_column(String(20), index=True)


class _Leg(_Row):
    __tablename__ = "legs"
    __table_args__ = (UniqueConstraint("run_id", "digest"),)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"))
    digest: Mapped[str] = mapped_column(String(64))
    device: Mapped[str] = mapped_column(String(255), index=True)
    recipe: Mapped[str] = mapped_column(String(255), index=True)
    workload: Mapped[str] = mapped_column(String(255))
    validity: Mapped[str] = mapped_column(String(20))


class _Infrastructure(_Row):
    __tablename__ = "infrastructure"
    __table_args__ = (UniqueConstraint("run_id", "digest"),)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"))
    digest: Mapped[str] = mapped_column(String(64))


def open_store(where: str | Path | None = None) -> SqlStore:
    """The store at ``where``: a SQLAlchemy URL, a SQLite file's path, or None for DEFAULT_STORE.

    Raises:
        StoreError: it cannot be opened, or another version of kvfarm made it.
    """
    text = str(where or DEFAULT_STORE)
    return SqlStore(text if "://" in text else f"sqlite:///{text}")


class SqlStore:
    """See harness.store.protocol.Store. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        with _plainly(f"open the store {_shown(url)}"):
            self._engine = _engine(url)
            try:
                self._prepare()
            except BaseException:
                self._engine.dispose()
                raise

    def begin_run(self, run: RunResults) -> None:
        header = dataclasses.replace(run, devices=(), checks=(), legs=(), infrastructure=())
        with _plainly(f"keep run {run.run_id}"):
            self._upsert(
                _Run,
                {"run_id": run.run_id},
                {"started_at": run.started_at, "model": run.model, "finished_at": run.finished_at},
                _dump(header),
            )

    def add_device(self, run_id: str, device: DeviceInfo) -> None:
        with _plainly(f"keep device {device.name} of run {run_id}"):
            self._upsert(_Device, {"run_id": run_id, "name": device.name}, {}, _dump(device))

    def add_check(self, run_id: str, check: CheckResult) -> None:
        key = {"run_id": run_id, "device": check.device, "recipe": check.recipe, "name": check.check}
        with _plainly(f"keep check {check.check} of run {run_id}"):
            self._upsert(_Check, key, {"outcome": check.outcome}, _dump(check))

    def add_leg(self, run_id: str, leg: LegResult) -> None:
        payload = _dump(leg)
        columns = {
            "device": leg.device,
            "recipe": leg.recipe,
            "workload": leg.workload,
            "validity": leg.validity,
        }
        with _plainly(f"keep a leg of {leg.recipe} on {leg.device} of run {run_id}"):
            self._upsert(_Leg, {"run_id": run_id, "digest": _digest(payload)}, columns, payload)

    def add_infrastructure(self, run_id: str, message: str) -> None:
        with _plainly(f"keep an infrastructure error of run {run_id}"):
            key = {"run_id": run_id, "digest": _digest(message)}
            self._upsert(_Infrastructure, key, {}, _dump(message))

    def finish_run(self, run_id: str, finished_at: str) -> None:
        with _plainly(f"finish run {run_id}"), Session(self._engine) as session, session.begin():
            run = session.scalar(select(_Run).where(_Run.run_id == run_id))
            if run is None:
                raise _no_run(run_id, session)
            run.finished_at = finished_at

    def results(self, run_id: str) -> RunResults:
        with _plainly(f"read run {run_id}"), Session(self._engine) as session:
            run = session.scalar(select(_Run).where(_Run.run_id == run_id))
            if run is None:
                raise _no_run(run_id, session)
            return dataclasses.replace(
                _load(RunResults, run.payload),
                finished_at=run.finished_at,
                devices=_rows(session, _Device, run_id, DeviceInfo),
                checks=_rows(session, _Check, run_id, CheckResult),
                legs=_rows(session, _Leg, run_id, LegResult),
                infrastructure=_rows(session, _Infrastructure, run_id, str),
            )

    def headers(self) -> tuple[RunResults, ...]:
        with _plainly("read the runs"), Session(self._engine) as session:
            rows = session.scalars(select(_Run).order_by(_Run.started_at.desc(), _Run.seq.desc()))
            return tuple(
                dataclasses.replace(_load(RunResults, row.payload), finished_at=row.finished_at)
                for row in rows
            )

    def runs(self) -> tuple[RunSummary, ...]:
        with _plainly("list the runs"), Session(self._engine) as session:
            rows = session.scalars(select(_Run).order_by(_Run.started_at.desc(), _Run.seq.desc()))
            return tuple(_summary(session, row) for row in rows)

    def latest(self) -> str:
        with _plainly("find the newest run"), Session(self._engine) as session:
            order = (_Run.started_at.desc(), _Run.seq.desc())
            found = session.scalar(select(_Run.run_id).order_by(*order).limit(1))
            if found is None:
                raise StoreError(
                    f"sought a run in {_shown(self._engine.url)}, found none; start one with `kvfarm run`"
                )
            return found

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> SqlStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        tables = set(inspect(self._engine).get_table_names())
        if _Schema.__tablename__ not in tables:
            if foreign := tables & set(_Base.metadata.tables):
                raise StoreError(
                    f"{_shown(self._engine.url)} has a table {min(foreign)!r} that kvfarm did not make; "
                    "give another --store"
                )
            self._create()
        with Session(self._engine) as session:
            versions = list(session.scalars(select(_Schema.version)))
        if versions != [SCHEMA_VERSION]:
            raise StoreError(
                f"{_shown(self._engine.url)}: sought store version {SCHEMA_VERSION}, found "
                f"{', '.join(map(str, versions)) or 'none'}; use the kvfarm that made it, or another --store"
            )

    def _create(self) -> None:
        # One transaction: nobody sees tables without their version, and what another process made
        # meanwhile is skipped.
        with Session(self._engine) as session, session.begin():
            _Base.metadata.create_all(session.connection())
            if session.scalar(select(_Schema.version)) is None:
                session.add(_Schema(version=SCHEMA_VERSION))

    def _upsert(self, table: type[_Row], key: dict[str, str], columns: dict[str, Any], payload: str) -> None:
        """One committed row for ``key``, whoever delivers it how often."""
        try:
            self._write(table, key, columns, payload)
        except IntegrityError:  # another process inserted the same key between our look and our insert
            self._write(table, key, columns, payload)

    def _write(self, table: type[_Row], key: dict[str, str], columns: dict[str, Any], payload: str) -> None:
        with Session(self._engine) as session, session.begin():
            row = session.scalar(select(table).filter_by(**key))
            if row is None:
                row = table(**key)
                session.add(row)
            row.payload = payload
            for name, value in columns.items():
                setattr(row, name, value)


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: object) -> None:
        # SQLAlchemy, not the sqlite3 module, says when a transaction begins.
        connection.isolation_level = None
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            _patiently(connection.execute, f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        # A deferred transaction that turns from reading to writing fails at once when another process
        # wrote meanwhile; an immediate one waits its turn.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


# SQLite does not wait, whatever its timeout says, while another connection turns the file's journal to
# WAL or closes as the last one (sqlite.org/wal.html, "Sometimes Queries Return SQLITE_BUSY In WAL Mode").
_patiently = Retrying(
    retry=retry_if_exception(
        lambda error: (
            getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        )
    ),
    wait=wait_random(0.005, 0.05),
    stop=stop_after_delay(BUSY_TIMEOUT_S),
    reraise=True,
)


def _summary(session: Session, row: _Run) -> RunSummary:
    def count(table: type[_Row], *conditions: Any) -> int:
        query = select(func.count()).select_from(table).where(*conditions)
        return session.scalar(query.filter_by(run_id=row.run_id)) or 0

    return RunSummary(
        run_id=row.run_id,
        started_at=row.started_at,
        finished_at=row.finished_at,
        model=row.model,
        command=_load(RunResults, row.payload).command,
        devices=count(_Device),
        checks=count(_Check),
        failed=count(_Check, _Check.outcome.not_in(("passed", "not_supported"))),
        legs=count(_Leg),
    )


def _rows(session: Session, table: type[_Row], run_id: str, kind: type[T]) -> tuple[T, ...]:
    query = select(table.payload).filter_by(run_id=run_id).order_by(table.seq)
    return tuple(_load(kind, payload) for payload in session.scalars(query))


def _dump(value: Any) -> str:
    return json.dumps(encode(value), separators=(",", ":"), sort_keys=True)


def _load(kind: type[T], payload: str) -> T:
    return decode(kind, json.loads(payload))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _no_run(run_id: str, session: Session) -> StoreError:
    known = list(session.scalars(select(_Run.run_id).order_by(_Run.seq.desc()).limit(5)))
    return StoreError(
        f"sought run {run_id!r}, found {', '.join(known) or 'no runs'}; `kvfarm report` lists all"
    )


def _shown(url: Any) -> str:
    """The URL without its password."""
    return make_url(url).render_as_string(hide_password=True)


@contextmanager
def _plainly(what: str) -> Iterator[None]:
    """Database and decoding errors as a StoreError that says what was being done."""
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise StoreError(f"could not {what}: {reason}; check the file or URL given as --store") from error
    except (DecodeError, ValueError, OSError, ModuleNotFoundError) as error:
        raise StoreError(f"could not {what}: {error}") from error
