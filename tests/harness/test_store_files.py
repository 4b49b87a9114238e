"""``kvfarm history``, ``tag`` and ``export-results``: what people and other programs get of a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.cli import run as kvfarm
from harness.cli.history import sparkline, with_trend
from harness.errors import StoreError
from harness.store import SqlStore, open_store
from harness.store.parquet import TABLES, export
from kvengine.codec import decode
from reports.gate_results import GATE, Place
from reports.results import CheckResult, DeviceInfo, EnergyInfo, LegResult
from tests.harness.test_store import a_check, a_device, a_leg, a_run
from tests.harness.test_store_history import NIGHTS, a_cell, a_gate, leg, nights

Capture = pytest.CaptureFixture[str]


def filled(path: Path) -> SqlStore:
    store = open_store(path)
    nights(store)
    store.add_tag("n2", "v1.2")
    return store


@pytest.fixture
def database(tmp_path: Path) -> str:
    filled(tmp_path / "results.db").close()
    return str(tmp_path / "results.db")


# -- the commands ----------------------------------------------------------------------------------


def asked(capsys: Capture, *words: str) -> dict[str, Any]:
    assert kvfarm([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_history_shows_newest_first_with_change_and_trend(database: str, capsys: Capture) -> None:
    assert kvfarm(["history", "--store", database, "--metric", "ttft"]) == 0
    title, *rest = capsys.readouterr().out.splitlines()
    assert title.strip().startswith(
        "device host, recipe hybrid, model tiny-gemma3, workload prompt 8 + 4 new"
    )
    lines = [line for line in rest if "2026" in line]
    assert [line.split("│")[1].strip()[:10] for line in lines] == ["2026-01-03", "2026-01-02", "2026-01-01"]
    assert "12.0 ms" in lines[0]
    assert "+9.1 %" in lines[0]
    assert "▁▅█" in lines[0]
    assert "v1.2" in lines[0]
    assert "+10.0 %" in lines[1]
    assert "%" not in lines[2]


def test_history_as_json_can_be_cut_and_chosen(database: str, capsys: Capture) -> None:
    rows = asked(capsys, "history", "--store", database, "--metric", "ttft", "--limit", "1")["rows"]
    assert [(row["run_id"], row["value"], row["tags"]) for row in rows] == [("n2", 12.0, ["v1.2"])]
    assert rows[0]["change"] == pytest.approx(12 / 11 - 1)  # the run before is beyond the limit, not unknown
    assert asked(capsys, "history", "--store", database, "--device", "phone*")["rows"] == []
    assert len(asked(capsys, "history", "--store", database, "--since", "2026-01-03")["rows"]) == 4
    assert asked(capsys, "history", "--store", database, "--since", "1d")["rows"] == []


@pytest.mark.parametrize("since", ["999999d", "99999d", "soon"])
def test_history_since_never_is_told(database: str, since: str, capsys: Capture) -> None:
    code = kvfarm(["history", "--store", database, "--since", since])
    assert code == (2 if since != "99999d" else 0)
    assert "Traceback" not in capsys.readouterr().err


def test_history_of_verdicts(database: str, capsys: Capture) -> None:
    with open_store(database) as store:
        gate = a_gate(a_cell(), a_cell("decode", verdict="REGRESSED"))
        store.begin_run(replace(a_run("g1", NIGHTS[0]), gate=gate))
    cells = asked(capsys, "history", "--store", database, "--verdicts", "--metric", "decode")["cells"]
    assert [(cell["run_id"], cell["verdict"], cell["sd"]) for cell in cells] == [("g1", "REGRESSED", 0.01)]
    assert kvfarm(["history", "--store", database, "--verdicts"]) == 0
    assert "+3.0 % to +7.0 %" in capsys.readouterr().out


def test_markup_in_names_is_shown_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    with open_store(tmp_path / "r.db") as store:
        store.begin_run(a_run())
        store.add_leg("r1", leg(device="[red]x[/]"))
    assert kvfarm(["history", "--store", str(tmp_path / "r.db")]) == 0
    assert "[red]x[/]" in capsys.readouterr().out


def test_a_tag_is_given_afterwards_and_names_the_run_from_then_on(database: str, capsys: Capture) -> None:
    assert asked(capsys, "tag", "n0", "v1.0", "stable", "--store", database)["run_id"] == "n0"
    assert asked(capsys, "tag", "v1.0", "signed", "--store", database)["run_id"] == "n0"
    assert asked(capsys, "tag", "latest", "v2", "--store", database)["run_id"] == "n2"
    with open_store(database) as store:
        assert store.results("n0").tags == ("v1.0", "stable", "signed")
    report = asked(capsys, "report", "v1.0", "-o", str(Path(database).parent / "report"), "--store", database)
    assert report["run_id"] == "n0"
    runs = asked(capsys, "report", "--list", "--store", database)["runs"]
    assert [run["tags"] for run in runs] == [["v1.2", "v2"], [], ["v1.0", "stable", "signed"]]


@pytest.mark.parametrize("words", [["tag", "n9", "v1"], ["tag", "n0", "a b"], ["tag", "n0", "hybrid"]])
def test_a_tag_that_cannot_be_is_refused_and_nothing_is_made(
    database: str, words: list[str], capsys: Capture
) -> None:
    assert kvfarm([*words, "--store", database]) == 2
    assert "sought" in capsys.readouterr().err
    with open_store(database) as store:
        assert [run.tags for run in store.runs()] == [("v1.2",), (), ()]


@pytest.mark.parametrize("words", [["history"], ["tag", "r", "t"], ["export-results"]])
def test_a_mistyped_store_is_told_and_not_made(tmp_path: Path, words: list[str], capsys: Capture) -> None:
    assert kvfarm([*words, "--store", str(tmp_path / "nothing.db")]) == 2
    assert "sought a results database" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- trends ----------------------------------------------------------------------------------------


def test_a_change_is_since_the_run_before_of_the_same_series(tmp_path: Path) -> None:
    with open_store(tmp_path / "r.db") as store:
        for number, started in enumerate(NIGHTS):
            store.begin_run(a_run(f"n{number}", started))
            store.add_leg(f"n{number}", leg(1.0, 10.0 + number))
            store.add_leg(f"n{number}", leg(2.0, 100.0 - number, device="phone"))
        rows = store.history(metric="ttft")
        told = with_trend(rows[:3], rows)
    found = {(row.run_id, row.device): trend for row, trend in told}
    assert found["n2", "host"].change == pytest.approx(12 / 11 - 1)
    assert found["n2", "phone"].values == (100.0, 99.0, 98.0)
    assert found["n1", "host"].values == (10.0, 11.0)
    assert with_trend(rows[-1:], rows)[0][1].change is None


@pytest.mark.parametrize(
    ("values", "bars"), [((1.0,), ""), ((2.0, 2.0), "▁▁"), ((0.0, 1.0, 0.5), "▁█▅"), ((3.0, 1.0), "█▁")]
)
def test_a_sparkline_spans_from_the_lowest_to_the_highest(values: tuple[float, ...], bars: str) -> None:
    assert sparkline(values) == bars


# -- Parquet ---------------------------------------------------------------------------------------


def test_parquet_holds_all_that_was_stored_and_typed(tmp_path: Path) -> None:
    place = Place(GATE, "p8", 3, 1, "candidate")
    with open_store(tmp_path / "r.db") as store:
        store.begin_run(replace(a_run(), gate=a_gate(a_cell()), tags=("v1", "v2")))
        store.add_device("r1", a_device())
        store.add_check("r1", a_check("a"))
        store.add_check("r1", replace(a_check("b", "failed"), worst_error=float("nan"), retries=("x", "y")))
        store.add_leg("r1", leg(1.0, place=place, energy=EnergyInfo("rails", "", 0.5, 0.75)))
        store.add_leg("r1", leg(2.0, reasons=("too warm",), validity="NOISY"))
        store.add_infrastructure("r1", "phone fell off its cable")
        store.finish_run("r1", "2026-01-02T04:00:00+00:00")
        store.begin_run(a_run("r2", "2026-02-01T00:00:00+00:00"))
        steps: list[tuple[str, int, int]] = []
        counts = export(store, tmp_path / "out", lambda *step: steps.append(step))
        run, history, cells = store.results("r1"), store.history(), store.gate_cells()
    tables = {name: pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in TABLES}
    assert {name: table.num_rows for name, table in tables.items()} == counts
    assert steps == [("runs", 1, 2), ("runs", 2, 2)]
    for name, table in tables.items():
        assert table.schema.equals(pa.schema(list(TABLES[name].items())))

    def payloads(name: str, kind: type[Any]) -> tuple[Any, ...]:
        return tuple(decode(kind, json.loads(text)) for text in tables[name]["payload"].to_pylist())

    assert payloads("devices", DeviceInfo) == run.devices
    assert payloads("legs", LegResult) == run.legs
    # NaN is equal to nothing, itself included.
    assert repr(payloads("checks", CheckResult)) == repr(run.checks)
    assert tables["infrastructure"].to_pylist() == [{"run_id": "r1", "message": run.infrastructure[0]}]
    first, second = tables["legs"].to_pylist()
    assert first["ttft_ms"] == [2.0, 3.0, 10.0]
    assert first["itl_ms"] == [[1.0, 1.5]] * 3
    assert (first["block"], first["position"], first["arm"], second["arm"]) == (3, 1, "candidate", None)
    assert (first["energy_gross_j_per_token"], second["reasons"]) == (0.75, ["too warm"])
    newest = tables["runs"].to_pylist()[-1]
    assert (newest["run_id"], newest["finished_at"], newest["verdict"]) == ("r2", None, None)
    oldest = tables["runs"].to_pylist()[0]
    assert oldest["started_at"] == datetime.fromisoformat(run.started_at)
    assert (oldest["verdict"], oldest["tags"]) == ("PASS", ["v1", "v2"])
    assert [row["value"] for row in tables["history"].to_pylist()] == [row.value for row in reversed(history)]
    assert [row["sd"] for row in tables["gate_cells"].to_pylist()] == [cell.sd for cell in cells]


def test_an_export_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    with filled(tmp_path / "r.db") as store:
        export(store, folder, lambda *step: None)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def fails(**_: object) -> Callable[[], None]:
            raise StoreError("the server is gone")

        monkeypatch.setattr(store, "history", fails)
        store.add_leg("n0", a_leg(9.0))
        with pytest.raises(StoreError, match="the server is gone"):
            export(store, folder, lambda *step: None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_export_command_says_what_it_wrote(database: str, tmp_path: Path, capsys: Capture) -> None:
    found = asked(capsys, "export-results", "-o", str(tmp_path / "out"), "--store", database)
    assert found["rows"]["legs"] == 3
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == sorted(TABLES)
