"""Engines of both databases: what SQLite and PostgreSQL need to be told, and errors in plain words."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random

from harness.errors import StoreAway, StoreError
from harness.provenance import without_password
from kvengine.codec import DecodeError

BUSY_TIMEOUT_S = 30  # writers wait for each other: one commit takes milliseconds
CONNECT_TIMEOUT_S = 10
SORT_MEMORY = "64MB"  # of a server, for one sort of ours
RECONNECT_S = 15  # a server that is restarted meanwhile costs no run
_READS = "kvfarm_reads"
_SQLITE_AWAY = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
)
# Without these a read from a host that has vanished waits for two hours.
_KEEPALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": BUSY_TIMEOUT_S * 1000,
}


def open_engine(url: str) -> Engine:
    """The engine for ``url``; nothing is connected yet.

    Raises:
        StoreError: neither SQLite nor PostgreSQL. SQLAlchemyError, ModuleNotFoundError, OSError.
    """
    parsed = make_url(url)
    kind = parsed.get_backend_name()
    if kind == "sqlite":
        return _sqlite(parsed)
    if kind == "postgresql":
        return _postgresql(parsed)
    raise StoreError(
        f"sought a SQLite file or postgresql+psycopg://USER@HOST/DATABASE, found {kind}; give another --store"
    )


@contextmanager
def transaction(engine: Engine, *, reads: bool = False) -> Iterator[Connection]:
    """Committed at the end. reads: nothing is written, so no writer is waited for."""
    with engine.connect() as connection:
        connection = connection.execution_options(**{_READS: reads})
        with connection.begin():
            yield connection


def attempts(engine: Engine) -> Retrying:
    """Try again where a PostgreSQL server went away: it may be back, and all we write may be repeated."""
    if engine.dialect.name != "postgresql":
        return Retrying(stop=stop_after_attempt(1), reraise=True)
    return Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, OperationalError)),
        wait=wait_random(0.05, 0.5),
        stop=stop_after_delay(RECONNECT_S),
        reraise=True,
    )


def _sqlite(url: URL) -> Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: object) -> None:
        # SQLAlchemy, not the sqlite3 module, says when a transaction begins.
        connection.isolation_level = None
        # LIKE as PostgreSQL has it.
        settings = (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "case_sensitive_like = ON",
        )
        for pragma in settings:
            _patiently(connection.execute, f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred transaction that turns from reading to writing fails at once when another process
        # wrote meanwhile; an immediate one waits its turn.
        reads = connection.get_execution_options().get(_READS)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

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


def _postgresql(url: URL) -> Engine:
    given = dict(url.query)
    ours: dict[str, Any] = {"connect_timeout": CONNECT_TIMEOUT_S, **_KEEPALIVE}
    known = ours if url.get_driver_name().startswith("psycopg") else {}
    # pool_pre_ping: a connection that died while it was idle is replaced before it is used.
    engine = create_engine(
        url, pool_pre_ping=True, connect_args={k: v for k, v in known.items() if k not in given}
    )

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_TIMEOUT_S}s'")
        # A history is sorted in memory and not on disk, and compiling a statement costs more than it saves.
        connection.exec_driver_sql(f"SET LOCAL work_mem = '{SORT_MEMORY}'; SET LOCAL jit = off")

    return engine


@contextmanager
def plainly(what: str, url: str) -> Iterator[None]:
    """Database and decoding errors as a StoreError that says what was being done, never a password."""
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        kind = StoreAway if _may_come_back(error) else StoreError
        raise kind(
            f"could not {what}: {_scrubbed(reason, url)}; check the file or URL given as --store"
        ) from error
    except ModuleNotFoundError as error:
        raise StoreError(
            f"could not {what}: sought the package {error.name}, found it not installed; "
            "pip install 'kvfarm[postgres]' has what PostgreSQL needs"
        ) from error
    except (DecodeError, ValueError, OSError) as error:
        raise StoreError(f"could not {what}: {_scrubbed(str(error), url)}") from error


def _may_come_back(error: SQLAlchemyError) -> bool:
    """Whether the database is away, locked or full, and what was asked of it is not at fault."""
    cause = getattr(error, "orig", None)
    if isinstance(cause, sqlite3.Error):
        return (getattr(cause, "sqlite_errorcode", None) or 0) & 0xFF in _SQLITE_AWAY
    return isinstance(error, OperationalError | InterfaceError)


def _scrubbed(text: str, url: str) -> str:
    """``text``, which a driver wrote, without the password of ``url``."""
    with suppress(SQLAlchemyError, ValueError):
        if (secret := make_url(url).password) and len(secret) > 2:
            text = text.replace(secret, "***")
    return without_password(text)
