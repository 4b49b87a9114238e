"""A PostgreSQL server that goes away, and the one that tests start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from device_agents.deadline import Deadline
from harness.errors import StoreError
from harness.provenance import command_line
from harness.store import engine as engines
from harness.store import open_store
from tests import postgres as postgresql
from tests.harness.test_store import a_check, a_run

ROOT = Path(__file__).parents[2]


def command(folder: str, statement: str) -> None:
    with psycopg.connect(host=folder, user=postgresql.USER, dbname="postgres", autocommit=True) as server:
        server.execute(statement.encode())


def end_connections(folder: str, database: str) -> None:
    """As a server does that is shut down for a moment."""
    name = make_url(database).database
    command(folder, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")


def test_a_connection_that_is_lost_between_two_results_costs_nothing(database: str, postgres: str) -> None:
    with open_store(database) as store:
        store.begin_run(a_run())
        end_connections(postgres, database)
        store.add_check("r1", a_check())
        end_connections(postgres, database)
        assert len(store.results("r1").checks) == 1


def test_a_connection_that_is_lost_in_the_middle_of_a_result_costs_nothing(
    database: str, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(database) as store:
        store.begin_run(a_run())
        begin, times = store._upsert, iter(range(10))

        def lose_it_once(*arguments: object) -> None:
            if next(times) == 0:
                end_connections(postgres, database)
            begin(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "_upsert", lose_it_once)
        store.add_check("r1", a_check())
        assert next(times) == 2
        assert len(store.results("r1").checks) == 1


def test_a_server_that_stays_away_is_told_without_the_password(
    postgres: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "RECONNECT_S", 0.2)
    name = make_url(database).database
    with open_store(postgresql.url(postgres, str(name), "hunter2")) as store:
        store.begin_run(a_run())
        command(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        end_connections(postgres, database)
        with pytest.raises(StoreError, match=r"could not keep check decode of run r1: .*--store") as caught:
            store.add_check("r1", a_check())
        assert "hunter2" not in str(caught.value)
        command(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        store.add_check("r1", a_check())


def test_no_server_is_told_at_once_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"could not open the store postgresql\+psycopg://u:\*\*\*@"
    ) as caught:
        open_store(postgresql.url(str(tmp_path), "results", "hunter2").replace("kvfarm:", "u:"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://u:hunter2@localhost:port/d",
        "postgresql+psycopg://u:hunter2@/d?nonsense=1",
        "postgresql+psycopg://u:hunter2@nowhere.invalid/d",
        "mysql://u:hunter2@h/d",
        "://u:hunter2@h/d",
    ],
)
def test_what_is_no_store_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(StoreError, match=r"--store|invalid|could not") as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


def test_what_a_driver_says_is_told_without_the_password() -> None:
    with (
        pytest.raises(StoreError, match=r"could not open it: no route for user=u password=\*\*\*") as caught,
        engines.plainly("open it", "postgresql+psycopg://u:hunter%2B2@h/d"),
    ):
        raise OSError("no route for user=u password=hunter+2")
    assert "hunter" not in str(caught.value)


def test_a_command_is_kept_without_the_passwords_in_it() -> None:
    words = ["kvfarm", "gate", "--store=postgresql+psycopg://u:hun@ter2@h/d", "--candidate", "a:b@c"]
    assert command_line(words) == "kvfarm gate '--store=postgresql+psycopg://u:***@h/d' --candidate a:b@c"


STARTER = """
import sys
from tests import postgres
with postgres.server(postgres.programs()) as folder:
    sys.stdout.write(folder + "\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


@pytest.mark.usefixtures("postgres")  # to skip where there is none
def test_a_server_is_gone_when_who_started_it_was_killed() -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert starter.stdout is not None
    assert starter.stdin is not None
    with starter.stdout, starter.stdin:
        folder = Path(starter.stdout.readline().strip())
        pid = int((folder / "data" / "postmaster.pid").read_text().splitlines()[0])
        starter.send_signal(signal.SIGKILL)
        starter.wait(10)
    deadline = Deadline(postgresql.STOP_S)
    while folder.exists() or Path(f"/proc/{pid}").exists():
        deadline.check("the server's end")
        time.sleep(0.05)
