"""An older kvfarm's store is brought to today's version with nothing lost; a newer one is refused."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.engine import Connection
from sqlalchemy.pool import NullPool

from harness.errors import StoreError
from harness.store import open_store, schema
from harness.store.migrations import steps
from harness.store.tables import SCHEMA_VERSION, VERSION_TABLE, Base
from kvengine.codec import decode, encode
from reports.results import RunResults

ROOT = Path(__file__).parents[2]
# A store as the kvfarm of version 1 made it, and what that kvfarm read from it.
V1 = Path(__file__).parent / "store_v1.sql"
V1_RESULTS = Path(__file__).parent / "store_v1.json"


def url(where: str) -> str:
    return where if "://" in where else f"sqlite:///{where}"


def connected(where: str) -> Connection:
    return create_engine(url(where), poolclass=NullPool).connect()


@pytest.fixture
def old(nothing: str) -> str:
    """A version-1 store, on a server too, which that version could be told to use."""
    if "://" not in nothing:
        connection = sqlite3.connect(nothing)
        connection.executescript(V1.read_text())
        connection.close()
        return nothing
    with psycopg.connect(make_url(nothing).set(drivername="postgresql").render_as_string()) as server:
        for statement in on_postgresql(V1.read_text()):
            server.execute(statement.encode())
    return nothing


def on_postgresql(script: str) -> list[str]:
    """SQLite's dump as PostgreSQL takes it: runs first, for the rest refers to them, and rows counted on."""
    statements = [s for s in script.split(";\n") if s.startswith(("CREATE", "INSERT"))]
    statements.sort(key=lambda s: (not s.startswith("CREATE TABLE"), re.split(r"\W+", s)[2] != "runs"))
    tables = [re.split(r"\W+", s)[2] for s in statements if "seq INTEGER NOT NULL" in s]
    counted = [f"SELECT setval('{name}_seq_seq', (SELECT max(seq) FROM {name}))" for name in tables]
    return [s.replace("seq INTEGER NOT NULL", "seq SERIAL NOT NULL") for s in statements] + counted


def test_nothing_of_an_older_store_is_lost(old: str) -> None:
    expected: dict[str, Any] = json.loads(V1_RESULTS.read_text())
    with open_store(old) as store:
        found = {run.run_id: store.results(run.run_id) for run in store.runs()}
    assert list(found) == ["calibrated", "gated", "killed", "plain"]
    for run_id, run in expected.items():
        # The one thing that moved: a gate's tag is the run's.
        tag = run["gate"].pop("tag") if run["gate"] else ""
        # As text, for NaN is not equal to itself. What version 1 did not know has its default.
        sought = decode(RunResults, run | {"tags": [tag] if tag else []})
        assert json.dumps(encode(found[run_id])) == json.dumps(encode(sought))


def test_what_an_older_store_measured_and_judged_can_be_asked_for(old: str) -> None:
    with open_store(old) as store:
        history = [(r.run_id, r.recipe, r.arm, r.metric, r.value, r.legs) for r in store.history()]
        cells = [(c.run_id, c.metric, c.comparison, c.verdict, c.aa) for c in store.gate_cells()]
        assert store.find("v1.0") == "gated"
        (resumed,) = store.headers(kind="gate", plan_key="key-gate")
    assert [row[:3] for row in history if row[3] == "ttft"] == [
        ("calibrated", "static", "baseline"),
        ("calibrated", "static", "candidate"),
        ("gated", "static", "baseline"),
        ("gated", "hybrid", "candidate"),
        ("plain", "hybrid", ""),
        ("plain", "static", ""),
    ]
    assert ("plain", "static", "", "ttft", 5.0, 1) in history
    assert ("plain", "static", "", "decode", 2.25, 1) in history
    assert ("plain", "hybrid", "", "energy", 0.75, 1) in history
    assert ("plain", "hybrid", "", "memory", float(1 << 20), 2) in history
    assert cells == [
        ("calibrated", "ttft", "A/A", "PASS", True),
        ("calibrated", "ttft", "+5 %", "REGRESSED", False),
        ("gated", "ttft", "gate", "PASS", False),
        ("gated", "decode", "gate", "REGRESSED", False),
    ]
    assert resumed.run_id == "gated"


def test_a_migrated_store_says_what_a_store_says_that_was_filled_today(old: str, tmp_path: Path) -> None:
    """The migration computes by itself what today's code computes: it must not change with it."""
    with open_store(old) as migrated, open_store(tmp_path / "today.db") as today:
        for summary in reversed(migrated.runs()):
            run = migrated.results(summary.run_id)
            today.begin_run(run)
            for device in run.devices:
                today.add_device(run.run_id, device)
            for check in run.checks:
                today.add_check(run.run_id, check)
            for leg in run.legs:
                today.add_leg(run.run_id, leg)
        assert today.history() == migrated.history()
        assert today.gate_cells() == migrated.gate_cells()
        assert today.gates() == migrated.gates()
        assert today.runs() == migrated.runs()
        assert today.canaries() == migrated.canaries()
        assert {run_id for run_id, _ in migrated.canaries()} == {"gated"}


def test_a_migration_says_how_far_it_is(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a store of many legs it takes minutes. A new store has nothing to wait for."""
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(schema, "progress", lambda: nullcontext(lambda *step: told.append(step)))
    monkeypatch.setattr(steps, "BATCH", 7)
    open_store(old).close()
    with connected(old) as connection:
        legs = connection.scalar(text("SELECT count(*) FROM legs")) or 0
    stages: dict[str, list[int]] = {}
    for stage, done, _ in told:
        stages.setdefault(stage.removeprefix("bringing the store up to date: "), []).append(done)
    assert list(stages) == ["runs", "legs", "canaries"]
    assert stages["legs"] == [*range(7, legs, 7), legs]
    assert told[-1][1] == told[-1][2]
    told.clear()
    open_store(old).close()
    assert told == []


def test_a_migrated_store_goes_on_taking_results_once(old: str) -> None:
    with open_store(old) as store:
        run = store.results("plain")
        for leg in run.legs:
            store.add_leg("plain", leg)
        for message in run.infrastructure:
            store.add_infrastructure("plain", message)
        store.add_infrastructure("plain", "another")
        assert len(store.results("plain").legs) == len(run.legs)
        assert store.results("plain").infrastructure == (*run.infrastructure, "another")


@pytest.mark.parametrize("from_version", ["1", None])
def test_the_migrations_make_the_very_tables_that_are_used(
    nothing: str, from_version: str | None, request: pytest.FixtureRequest
) -> None:
    if from_version:
        request.getfixturevalue("old")
    open_store(nothing).close()
    with connected(nothing) as connection:
        # SQLite holds nobody to a text's length; there the old declaration stays.
        options: dict[str, Any] = {"compare_type": connection.dialect.name != "sqlite"}
        options |= {"include_name": lambda name, kind, _: name not in (VERSION_TABLE, "kvfarm_schema")}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_the_newest_version_is_ours() -> None:
    scripts = ScriptDirectory(str(ROOT / "harness" / "store" / "migrations"))
    assert scripts.get_current_head() == SCHEMA_VERSION


OPENER = """
import sys
from harness.store import open_store
sys.stdin.readline()
open_store(sys.argv[1]).close()
"""


@pytest.mark.parametrize("from_version", ["1", None])
def test_several_processes_that_open_it_at_once_migrate_it_once(
    nothing: str, from_version: str | None, request: pytest.FixtureRequest
) -> None:
    if from_version:
        request.getfixturevalue("old")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER, nothing],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(3)
    ]
    # All have imported what they need when they are let go.
    with ThreadPoolExecutor(3) as pool:
        errors = list(pool.map(lambda process: process.communicate("go\n", timeout=60)[1], processes))
    assert [(p.returncode, e) for p, e in zip(processes, errors, strict=True)] == [(0, "")] * 3
    with open_store(nothing) as store:
        assert len(store.runs()) == (4 if from_version else 0)


def test_a_migration_that_fails_leaves_the_store_as_it_was(old: str) -> None:
    with connected(old) as connection, connection.begin():
        connection.execute(text("UPDATE legs SET payload = '{' WHERE seq = 9"))
    with pytest.raises(StoreError, match="could not open the store"):
        open_store(old)
    with connected(old) as connection:
        assert connection.scalar(text("SELECT version FROM kvfarm_schema")) == 1
        assert connection.scalar(text("SELECT count(*) FROM legs WHERE device = 'host'")) == 15
        assert "tags" not in connection.dialect.get_table_names(connection)


def test_a_newer_store_is_refused_with_what_to_do(nothing: str) -> None:
    open_store(nothing).close()
    with connected(nothing) as connection, connection.begin():
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '99'"))
    expected = rf"sought store version {SCHEMA_VERSION} or older, found 99; use the kvfarm that made it"
    with pytest.raises(StoreError, match=expected):
        open_store(nothing)


def test_the_kvfarm_of_version_1_refuses_what_was_migrated(old: str) -> None:
    """It looks for one row with the number 1, and says what it found."""
    open_store(old).close()
    with connected(old) as connection:
        assert list(connection.scalars(text("SELECT version FROM kvfarm_schema"))) == [2]


def test_somebody_elses_database_is_left_alone(nothing: str) -> None:
    with connected(nothing) as connection, connection.begin():
        connection.execute(text("CREATE TABLE runs (id INTEGER)"))
    with pytest.raises(StoreError, match=r"sought a kvfarm store at .*, found a table 'runs'"):
        open_store(nothing)
    with connected(nothing) as connection:
        assert connection.dialect.get_table_names(connection) == ["runs"]
