"""Stores to test with: a SQLite file, and a database of a PostgreSQL server that runs for the session."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests import postgres as postgresql

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
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(host=postgres, user=postgresql.USER, dbname="postgres", autocommit=True) as server:
        server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield postgresql.url(postgres, name)
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What to give as --store: nothing is there yet."""
    if request.param == "sqlite":
        return str(tmp_path / "results.db")
    url: str = request.getfixturevalue("database")
    return url
