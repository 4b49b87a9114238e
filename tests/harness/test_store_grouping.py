"""Writers of several threads share commits, and each has what it would have had alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import event

from harness.errors import StoreError
from harness.store import SqlStore, open_store
from harness.store.protocol import Span
from tests.reports.sample import check, leg, sample_run

THREADS = 16


class Gate:
    """Holds back the first commit until as many writers wait behind it."""

    def __init__(self, store: SqlStore, waiting: int) -> None:
        self._store, self._waiting = store, waiting
        self.commits, self._begun = 0, False
        event.listen(store._engine, "commit", self._count)
        event.listen(store._engine, "begin", self._hold)

    def _count(self, _: object) -> None:
        self.commits += 1

    def _hold(self, _: object) -> None:
        if not self._begun:
            self._begun = True
            pause = threading.Event()
            for _ in range(1000):
                if len(self._store._writes._waiting) >= self._waiting:
                    return
                pause.wait(0.01)
            raise AssertionError("the others did not come")


@pytest.fixture
def store(tmp_path: Path) -> SqlStore:
    made = open_store(tmp_path / "results.db")
    made.begin_run(sample_run(run_id="run", legs=(), checks=(), devices=(), infrastructure=()))
    return made


def together(store: SqlStore, works: list[Callable[[], object]]) -> tuple[Gate, list[BaseException | None]]:
    gate = Gate(store, len(works) - 1)
    with ThreadPoolExecutor(len(works)) as pool:
        return gate, [each.exception() for each in [pool.submit(work) for work in works]]


def test_waiting_writers_share_one_commit(store: SqlStore) -> None:
    legs = [leg(load_ms=float(number)) for number in range(THREADS)]
    gate, errors = together(store, [lambda each=each: store.add_leg("run", each) for each in legs])  # type: ignore[misc]
    assert errors == [None] * THREADS
    assert gate.commits == 2, "the first one's, and one for all who came meanwhile"
    assert {each.load_ms for each in store.results("run").legs} == {each.load_ms for each in legs}


def test_what_fails_in_a_group_fails_alone(store: SqlStore) -> None:
    works: list[Callable[[], object]] = [
        lambda: store.add_leg("run", leg(load_ms=1.0)),
        lambda: store.add_leg("run", leg(load_ms=2.0)),
        lambda: store.finish_run("no such run", "2026-01-01T00:00:00+00:00"),
        lambda: store.add_leg("run", leg(load_ms=3.0)),
    ]
    _, errors = together(store, works)
    assert [type(error) for error in errors] == [type(None), type(None), StoreError, type(None)]
    assert {each.load_ms for each in store.results("run").legs} == {1.0, 2.0, 3.0}


def test_a_result_and_when_it_was_done_are_kept_together_or_not_at_all(store: SqlStore) -> None:
    """Else one that was killed between them would have done a check that is missing in its device's count."""
    checks = [check(name=f"p0{number}") for number in range(2)]
    spans = [
        Span("pixel", "check", "static", 1.0, 2.0, "passed"),
        Span("pixel", "leg", "static", 1.0, 2.0, "VALID"),
    ]
    _, errors = together(
        store,
        [
            lambda: store.add_check("run", checks[0], spans[0]),
            lambda: store.add_leg("run", leg(), spans[1]),
            lambda: store.add_check("run", checks[1]),
        ],
    )
    assert errors == [None] * 3
    assert sorted(store.spans("run"), key=lambda span: span.kind) == spans
    with store._engine.connect() as connection:
        connection.exec_driver_sql("DROP TABLE spans")
        connection.commit()
    with pytest.raises(StoreError):
        store.add_check("run", check(name="p09"), spans[0])
    with pytest.raises(StoreError):
        store.add_leg("run", leg(load_ms=9.0), spans[1])
    found = store.results("run")
    assert (len(found.checks), len(found.legs)) == (2, 1)


def test_a_commit_that_fails_is_nobodys_success(store: SqlStore, tmp_path: Path) -> None:
    with store._engine.connect() as connection:
        connection.exec_driver_sql("DROP TABLE measured")
        connection.exec_driver_sql("DROP TABLE legs")
        connection.commit()
    works: list[Callable[[], object]] = [lambda: store.add_leg("run", leg())] * 4
    _, errors = together(store, works)
    assert [type(error) for error in errors] == [StoreError] * 4


def test_results_are_on_the_disk_when_add_returns(store: SqlStore, tmp_path: Path) -> None:
    store.add_leg("run", leg(load_ms=7.0))
    with open_store(tmp_path / "results.db") as other:
        assert [each.load_ms for each in other.results("run").legs] == [7.0]
