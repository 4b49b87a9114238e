"""A store whose database goes away: results wait in a file, and are all there once it is back."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url

from harness.errors import StoreAway, StoreError
from harness.store import engine, open_store, spool
from harness.store.protocol import Part, Span
from harness.store.spool import SpoolingStore
from tests.harness.test_store import a_check, a_leg, a_run
from tests.harness.test_store_servers import command, end_connections

ROOT = Path(__file__).parents[2]
SPAN = Span("host", "check", "decode", 1.0, 2.0, "passed", parts=(Part("program", "one", 1.0, 2.0),))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(engine, "RECONNECT_S", 0.05)
    monkeypatch.setattr(spool, "_RETRY_S", 0.02)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process writes to the database and does not end."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.rollback()
        other.close()


def spooling(where: Path | str, folder: Path, patience_s: float = 20.0) -> SpoolingStore:
    return SpoolingStore(where, folder, "r1", patience_s=patience_s)


def test_what_a_locked_database_does_not_take_waits_and_arrives_in_order(
    made_file: Path, tmp_path: Path
) -> None:
    path, folder = tmp_path / "r.db", tmp_path / "spool"
    path.write_bytes(made_file.read_bytes())
    store = spooling(path, folder)
    store.begin_run(a_run())
    assert not folder.exists(), "as long as the database is there, there is no spool"
    with locked(path):
        for number in range(3):
            store.add_check("r1", a_check(f"check {number}"))
        store.add_check("r1", a_check("check 0", outcome="failed"))
        store.add_leg("r1", a_leg())
        assert store.waiting == 5
        (file,) = folder.iterdir()
        assert len(file.read_text().splitlines()) == 5, "on the disk when the call returned"
    results = store.results("r1")
    assert [(c.check, c.outcome) for c in results.checks] == [
        ("check 0", "failed"),
        ("check 1", "passed"),
        ("check 2", "passed"),
    ]
    assert len(results.legs) == 1
    assert store.waiting == 0
    assert list(folder.iterdir()) == [], "delivered is removed"
    store.close()


def test_a_server_that_is_restarted_loses_nothing(database: str, postgres: str, tmp_path: Path) -> None:
    store, name = spooling(database, tmp_path), make_url(database).database
    store.begin_run(a_run())
    command(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    end_connections(postgres, database)
    store.add_check("r1", a_check())
    store.finish_run("r1", "2026-01-02T03:05:00+00:00")
    assert store.waiting == 2
    command(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    results = store.results("r1")
    assert (len(results.checks), results.finished_at) == (1, "2026-01-02T03:05:00+00:00")
    store.close()


def test_a_database_that_stays_away_is_told_with_where_the_results_are(
    made_file: Path, tmp_path: Path
) -> None:
    path, said = tmp_path / "r.db", list[str]()
    path.write_bytes(made_file.read_bytes())
    store = SpoolingStore(path, tmp_path / "spool", "r1", said.append, patience_s=0.3)
    store.begin_run(a_run())
    with locked(path):
        store.add_check("r1", a_check())
        with pytest.raises(StoreAway, match=r"1 results wait in .*r1\..*jsonl.* `kvfarm resume`") as caught:
            store.drain()
        assert "locked" in str(caught.value)
        assert any("nothing is lost" in line for line in said)
        store.close()
    with_what_was_left = spooling(path, tmp_path / "spool")
    assert with_what_was_left.adopt() == 1
    assert len(with_what_was_left.results("r1").checks) == 1
    assert list((tmp_path / "spool").iterdir()) == []
    with_what_was_left.close()


def test_when_the_spools_disk_is_full_too_the_run_waits(
    made_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "r.db"
    path.write_bytes(made_file.read_bytes())
    store = spooling(path, tmp_path / "spool", patience_s=0.3)
    store.begin_run(a_run())
    monkeypatch.setattr(spool, "_append", full)
    with locked(path), pytest.raises(StoreAway, match="make room, and `kvfarm resume`"):
        store.add_check("r1", a_check())
    store.add_check("r1", a_check("another"))
    assert len(store.results("r1").checks) == 2, "not even the one that it gave up to wait for"
    store.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from harness.store import engine
engine.BUSY_TIMEOUT_S = 0.05
from harness.store.spool import SpoolingStore
from tests.harness.test_spool import SPAN, locked
from tests.harness.test_store import a_check, a_run
store = SpoolingStore(sys.argv[1], Path(sys.argv[2]), "r1")
with locked(Path(sys.argv[1])):
    store.begin_run(a_run())
    store.add_check("r1", a_check(), SPAN)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_delivered_by_who_goes_on(made_file: Path, tmp_path: Path) -> None:
    """Not even the run's beginning had got into the store; the last line is cut off."""
    path, folder = tmp_path / "r.db", tmp_path / "spool"
    path.write_bytes(made_file.read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, path, folder], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes() + b'{"what": "check", "run_')
    living = spooling(path, folder)
    assert living.adopt() == 2
    assert [check.check for check in living.results("r1").checks] == ["decode"]
    assert living.spans("r1") == (SPAN,)
    assert living.adopt() == 0
    living.close()


def test_what_the_database_refuses_is_told_and_kept(made_file: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "r.db", tmp_path / "spool"
    path.write_bytes(made_file.read_bytes())
    store = spooling(path, folder)
    with pytest.raises(StoreError):
        store.add_check("no such run", a_check())
    with locked(path):
        store.add_check("no such run", a_check())
    with pytest.raises(StoreError, match="refuses what waits in"):
        store.drain()
    store.close()
    assert len(list(folder.iterdir())) == 1


def test_a_wrong_command_is_not_the_databases_absence(made_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    path.write_bytes(made_file.read_bytes())
    with open_store(path) as store, pytest.raises(StoreError) as caught:
        store.add_check("no such run", a_check())
    assert not isinstance(caught.value, StoreAway)
