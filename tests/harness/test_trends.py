"""From the store's history to the lines of the trend, and the commands that show several runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from harness.errors import StoreError
from harness.store import open_store
from harness.store.protocol import Store
from harness.trends import series_of_run, series_of_store
from reports.gate_results import GATE, Arm, Place
from reports.results import LegResult, SampleInfo
from tests.harness.test_cli import Line
from tests.harness.test_store import a_device, a_leg, a_run


def slow_leg(itl_ms: float, arm: Arm | None = None) -> LegResult:
    """Every gap and the first token take ``itl_ms``; with ``arm`` the leg of a gate."""
    leg = dataclasses.replace(a_leg(), samples=(SampleInfo(itl_ms, (itl_ms,) * 8),) * 2)
    if arm is None:
        return leg
    leg = dataclasses.replace(leg, place=Place(GATE, "p8+n4", 0, 0, arm))
    return dataclasses.replace(leg, recipe="canary", model="canary") if arm == "canary" else leg


def keep(store: Store, night: int, *legs: LegResult, tag: str = "") -> None:
    run = a_run(f"night-{night:02d}", started_at=f"2026-09-{night:02d}T02:00:00+00:00")
    store.begin_run(run)
    for leg in legs:
        store.add_leg(run.run_id, leg)
    store.finish_run(run.run_id, f"2026-09-{night:02d}T03:00:00+00:00")
    if tag:
        store.add_tag(run.run_id, tag)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Ten nights; from the ninth on a token takes a fifth longer."""
    with open_store(tmp_path / "r.db") as store:
        for night in range(1, 11):
            keep(store, night, slow_leg(24.0 if night >= 9 else 20.0), tag="v1.0" if night == 3 else "")
    return tmp_path / "r.db"


def test_a_line_is_a_cell_over_runs_oldest_first(database: Path) -> None:
    with open_store(database) as store:
        lines = {line.metric: line for line in series_of_store(store)}
    assert set(lines) == {"TTFT", "ITL", "Peak memory"}
    itl = lines["ITL"]
    assert [night.value for night in itl.nights] == [20.0] * 8 + [24.0] * 2
    assert itl.nights[0].run_id == "night-01"
    assert [night.run_id for night in itl.nights if night.tags == ("v1.0",)] == ["night-03"]
    assert itl.unit == "ms"


def test_what_is_simulated_says_so(tmp_path: Path) -> None:
    with open_store(tmp_path / "r.db") as store:
        keep(store, 1, slow_leg(20.0))
        store.add_device("night-01", dataclasses.replace(a_device(), simulated="a virtual phone"))
        lines = series_of_store(store)
    assert {line.simulated for line in lines} == {"a virtual phone"}


def test_an_old_run_is_shown_as_it_was_then(database: Path) -> None:
    with open_store(database) as store:
        lines = series_of_run(store, store.results("night-05"))
    assert {line.nights[-1].run_id for line in lines} == {"night-05"}


def test_times_of_a_gate_come_with_its_canary_and_the_baseline_is_no_line(tmp_path: Path) -> None:
    with open_store(tmp_path / "r.db") as store:
        for night, weather in ((1, 1.0), (2, 1.5)):
            legs = (("baseline", 30.0), ("candidate", 20.0), ("canary", 2.0))
            keep(store, night, *(slow_leg(value * weather, arm) for arm, value in legs))  # type: ignore[arg-type]
        lines = {line.metric: line for line in series_of_store(store)}
    assert [(night.value, night.canary) for night in lines["ITL"].nights] == [(20.0, 2.0), (30.0, 3.0)]
    assert set(lines) == {"TTFT", "ITL"}  # processes that are timed are not weighed


def test_the_trend_command_names_what_got_worse_and_stays_green(
    database: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kvfarm = Line(capfd)
    said = kvfarm.json("trend", "--store", database, "-o", database.parent / "out")
    assert kvfarm.code == 0
    assert said["runs"] == 10
    assert {alert["since"] for alert in said["alerts"]} == {"night-09"}
    assert {alert["word"] for alert in said["alerts"]} == {"worse"}
    assert "<h2>Trend</h2>" in (database.parent / "out" / "index.html").read_text()


def test_one_night_is_no_trend_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_store(tmp_path / "r.db") as store:
        keep(store, 1, slow_leg(20.0))
    kvfarm = Line(capfd)
    said = kvfarm.json("trend", "--store", tmp_path / "r.db", "-o", tmp_path / "out")
    assert said["error"]["type"] == StoreError.__name__
    assert not (tmp_path / "out").exists()


def test_the_report_of_a_run_has_the_trend_of_its_cells(
    database: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = database.parent / "out"
    Line(capfd).json("report", "--store", database, "-o", out)
    assert '<section id="trend">' in (out / "index.html").read_text()
    Line(capfd).json("report", "night-01", "--store", database, "-o", out)
    assert '<section id="trend">' not in (out / "index.html").read_text()


def test_two_runs_are_compared_by_id_or_tag(database: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kvfarm = Line(capfd)
    said = kvfarm.json("compare", "v1.0", "night-10", "--store", database, "-o", database.parent / "out")
    assert (said["a"], said["b"]) == ("night-03", "night-10")
    assert kvfarm.code == 0
    assert "NO VERDICT" in (database.parent / "out" / "index.html").read_text()
    refused = kvfarm.json("compare", "v1.0", "nothing", "--store", database, "-o", database.parent / "no")
    assert "nothing" in refused["error"]["message"]


def test_the_trend_of_a_gate_is_of_its_candidate_and_reads_no_other_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs have hundreds of legs, and there are nights by the dozen."""
    with open_store(tmp_path / "r.db") as store:
        for night in (1, 2):
            legs = (slow_leg(20.0, "candidate"), slow_leg(20.0, "canary"))
            keep(store, night, dataclasses.replace(slow_leg(30.0, "baseline"), recipe="old"), *legs)
        run = store.results("night-02")
        monkeypatch.setattr(store, "results", lambda run_id: pytest.fail(f"{run_id} was read whole"))
        lines = series_of_run(store, run)
    assert {line.recipe for line in lines} == {"hybrid"}
    assert [night.canary for line in lines if line.metric == "ITL" for night in line.nights] == [20.0] * 2
