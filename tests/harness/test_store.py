"""The store keeps every result from the moment it is made, once, whatever happens to its writer."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.errors import StoreError
from harness.store import open_store
from reports.results import (
    CheckResult,
    DeviceInfo,
    Divergence,
    LegResult,
    RecipeInfo,
    RunResults,
    SampleInfo,
    TopLogits,
    VitalsInfo,
)

STARTED = "2026-01-02T03:04:05+00:00"


def a_run(run_id: str = "r1", started_at: str = STARTED) -> RunResults:
    return RunResults(
        run_id=run_id,
        started_at=started_at,
        finished_at=None,
        command="pytest --devices=host",
        seed=7,
        model="tiny-gemma3",
        reference="transformers, float32, no cache",
        provenance={"commit": "abc"},
        devices=(),
        recipes=(RecipeInfo("hybrid", {"cache": "hybrid"}),),
        checks=(),
        legs=(),
        planned_checks=2,
        planned_legs=1,
    )


def a_device(name: str = "host") -> DeviceInfo:
    return DeviceInfo(
        name=name,
        kind="host",
        model="m",
        soc="s",
        abi="x86_64",
        os="Linux",
        build="b",
        cores=2,
        ram_bytes=1 << 34,
        providers=("CPUExecutionProvider",),
        runtime={"python": "3.11"},
    )


def a_check(name: str = "decode", outcome: str = "passed") -> CheckResult:
    return CheckResult(
        device="host",
        recipe="hybrid",
        check=name,
        title="every decode step equals the reference",
        outcome=outcome,  # type: ignore[arg-type]
        seconds=1.5,
        programs=20,
        worst_error=1e-6,
        tolerance=1e-4,
    )


def a_leg(at: float = 1.0) -> LegResult:
    return LegResult(
        device="host",
        recipe="hybrid",
        model="tiny-gemma3",
        workload="prompt 8 + 4 new",
        prompt_tokens=8,
        new_tokens=4,
        load_ms=10.0,
        samples=(SampleInfo(3.0, (1.0, 1.25)),),
        peak_rss_bytes=1 << 20,
        kv_bytes=4096,
        nodes_by_provider={"CPUExecutionProvider": 9},
        threads=2,
        validity="VALID",
        reasons=(),
        vitals_before=VitalsInfo(at),
        vitals_after=VitalsInfo(at + 1, load_1m=0.5),
        provenance={"artifact": "f00"},
    )


def test_a_run_reads_back_as_it_was_written(where: str) -> None:
    with open_store(where) as store:
        store.begin_run(a_run())
        store.add_device("r1", a_device())
        store.add_check("r1", a_check("b"))
        store.add_check("r1", a_check("a", "failed"))
        store.add_leg("r1", a_leg())
        store.add_infrastructure("r1", "phone fell off its cable")
        store.finish_run("r1", "2026-01-02T03:05:05+00:00")
    with open_store(where) as store:
        assert store.results("r1") == dataclasses.replace(
            a_run(),
            finished_at="2026-01-02T03:05:05+00:00",
            devices=(a_device(),),
            checks=(a_check("b"), a_check("a", "failed")),
            legs=(a_leg(),),
            infrastructure=("phone fell off its cable",),
        )
        (summary,) = store.runs()
        assert (summary.devices, summary.checks, summary.failed, summary.legs) == (1, 2, 1, 1)


def test_a_result_delivered_twice_is_stored_once(where: str) -> None:
    with open_store(where) as store:
        store.begin_run(a_run())
        for _ in range(2):
            store.add_device("r1", a_device())
            store.add_check("r1", a_check())
            store.add_leg("r1", a_leg())
            store.add_infrastructure("r1", "phone fell off its cable")
        found = store.results("r1")
    assert (len(found.devices), len(found.checks), len(found.legs), len(found.infrastructure)) == (1, 1, 1, 1)


def test_a_retried_check_replaces_the_first_and_another_leg_is_added(where: str) -> None:
    with open_store(where) as store:
        store.begin_run(a_run())
        store.add_check("r1", a_check(outcome="infrastructure"))
        store.add_check("r1", a_check(outcome="passed"))
        store.add_leg("r1", a_leg(at=1.0))
        store.add_leg("r1", a_leg(at=2.0))
        found = store.results("r1")
    assert [c.outcome for c in found.checks] == ["passed"]
    assert [leg.vitals_before.at for leg in found.legs] == [1.0, 2.0]


def test_of_a_leg_that_is_delivered_twice_the_first_counts(where: str) -> None:
    """Even where the second time something else was seen around it."""
    with open_store(where) as store:
        store.begin_run(a_run())
        first, again = (dataclasses.replace(a_leg(at), key="test#0") for at in (1.0, 2.0))
        store.add_leg("r1", first)
        store.add_leg("r1", again)
        store.add_leg("r1", dataclasses.replace(again, key="test#1"))
        assert store.results("r1").legs == (first, dataclasses.replace(again, key="test#1"))
        store.begin_run(a_run("r2"))
        store.add_leg("r2", again)
        assert store.results("r2").legs == (again,), "a key is one of its run"


def test_beginning_again_replaces_the_header_and_keeps_the_results(where: str) -> None:
    with open_store(where) as store:
        store.begin_run(a_run())
        store.add_check("r1", a_check())
        store.begin_run(dataclasses.replace(a_run(), planned_checks=9))
        found = store.results("r1")
    assert (found.planned_checks, len(found.checks)) == (9, 1)


def test_errors_that_are_no_numbers_survive(where: str) -> None:
    top = TopLogits((1, 2), (0.5, None))
    divergence = Divergence(0, 1, 2, None, top, top)
    check = dataclasses.replace(a_check(), worst_error=math.nan, divergence=divergence)
    with open_store(where) as store:
        store.begin_run(a_run())
        store.add_check("r1", check)
        (found,) = store.results("r1").checks
    assert found.worst_error is not None
    assert math.isnan(found.worst_error)
    assert found.divergence == divergence


def test_runs_are_listed_newest_first(where: str) -> None:
    with open_store(where) as store:
        store.begin_run(a_run("new", "2026-02-01T00:00:00+00:00"))
        store.begin_run(a_run("old", "2026-01-01T00:00:00+00:00"))
        assert [run.run_id for run in store.runs()] == ["new", "old"]
        assert store.latest() == "new"


WRITER = """
import itertools, sys
from harness.store import open_store
from tests.harness.test_store import a_check, a_run
store = open_store(sys.argv[1])
store.begin_run(a_run())
for n in itertools.count():
    store.add_check("r1", a_check(f"check{n}"))
    sys.stdout.write(f"{n}\\n")
    sys.stdout.flush()
"""


def test_a_writer_killed_in_the_middle_loses_no_committed_result(where: str) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, where],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert writer.stdout is not None
    with writer.stdout as lines:
        told = [int(next(lines)) for _ in range(10)]
        writer.send_signal(signal.SIGKILL)
        told += [int(line) for line in lines if line.endswith("\n")]
    assert writer.wait(10) == -signal.SIGKILL
    with open_store(where) as store:
        kept = [check.check for check in store.results("r1").checks]
        store.add_check("r1", a_check("afterwards"))  # and the store still takes results
    # The writer may have committed one more than it lived to tell.
    assert kept[: len(told)] == [f"check{n}" for n in told]
    assert len(kept) - len(told) in (0, 1)


def test_writers_at_the_same_time_do_not_lose_or_double_anything(nothing: str) -> None:
    def write(_: int) -> None:
        with open_store(nothing) as store:
            store.begin_run(a_run())
            for n in range(10):
                store.add_check("r1", a_check(f"check{n}"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    with open_store(nothing) as store:
        assert sorted(c.check for c in store.results("r1").checks) == [f"check{n}" for n in range(10)]


def test_opening_waits_for_a_writer_before_the_journal_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    open_store(path).close()
    writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    writer.execute("PRAGMA journal_mode = DELETE")
    writer.execute("BEGIN IMMEDIATE")
    # SQLite itself does not wait for it here, whatever its timeout says.
    done = threading.Timer(0.3, writer.close)
    done.start()
    with open_store(path) as store:
        store.begin_run(a_run())
    done.join()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        open_store(path)


@pytest.mark.parametrize("url", ["nosuchdatabase://x/y", "postgresql+nodriver://u:secret@h/d"])
def test_an_unknown_url_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_results_without_a_run_are_refused(where: str) -> None:
    with open_store(where) as store:
        with pytest.raises(StoreError, match="check decode of run r9"):
            store.add_check("r9", a_check())
        with pytest.raises(StoreError, match="sought run 'r9', found no runs"):
            store.results("r9")
        with pytest.raises(StoreError, match="kvfarm run"):
            store.latest()
