"""Stores to test with: a SQLite file, and a database of a PostgreSQL server that runs for the session."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from harness.store import open_store
from harness.store.tables import Base
from tests import postgres as postgresql

KINDS = ("sqlite", "postgresql")
REQUIRED = "KVFARM_POSTGRES"  # set by make test, and so in CI: there is no skipping


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The folder of a PostgreSQL server's socket."""
    binaries = postgresql.programs()
    if binaries is None:
        told = "sought PostgreSQL's initdb, found none; run make apt"
        if os.environ.get(REQUIRED):
            pytest.fail(told)
        pytest.skip(told)
    with postgresql.server(binaries) as folder:
        yield folder


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """The URL of an empty database."""
    with _new_database(postgres) as url:
        yield url


@pytest.fixture(scope="session")
def made(postgres: str) -> Iterator[str]:
    """The URL of a database that is a store; all tests of a session have it, one after the other."""
    with _new_database(postgres) as url:
        open_store(url).close()
        yield url


@pytest.fixture(scope="session")
def made_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file that is a store, to copy: making one takes longer than most of what is tested."""
    path = tmp_path_factory.mktemp("made") / "results.db"
    open_store(path).close()
    return path


@pytest.fixture(params=KINDS)
def nothing(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What to give as --store: there is nothing yet."""
    if request.param == "sqlite":
        return str(tmp_path / "results.db")
    url: str = request.getfixturevalue("database")
    return url


@pytest.fixture(params=KINDS)
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """What to give as --store: it is empty."""
    if request.param == "sqlite":
        yield str(shutil.copy(request.getfixturevalue("made_file"), tmp_path))
        return
    url: str = request.getfixturevalue("made")
    yield url
    tables = sql.SQL(", ").join(map(sql.Identifier, Base.metadata.tables))
    with psycopg.connect(make_url(url).set(drivername="postgresql").render_as_string()) as store:
        store.execute("SET lock_timeout = '10s'")
        store.execute(sql.SQL("TRUNCATE {} RESTART IDENTITY").format(tables))


@contextmanager
def _new_database(folder: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(host=folder, user=postgresql.USER, dbname="postgres", autocommit=True) as server:
        server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield postgresql.url(folder, name)
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
