"""What a store can be asked: history, gates and their cells, runs by name; and that it asks by index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import event, text

from harness.errors import HarnessError, StoreError
from harness.store import SqlStore, open_store
from harness.store.rows import DRILL
from harness.tags import find_run, tags_of
from reports.gate_results import AA, GATE, Comparison, GateCell, GateInfo, Injection, Place, Side
from reports.results import EnergyInfo, LegResult, SampleInfo
from tests.harness.test_store import STARTED, a_check, a_device, a_leg, a_run

NIGHTS = ("2026-01-01T22:00:00+00:00", "2026-01-02T22:00:00+00:00", "2026-01-03T22:00:00+00:00")
OLD, NEW = Side("static", "static", "a" * 64, "{}"), Side("hybrid", "hybrid", "b" * 64, "{}")


@pytest.fixture
def store(where: str) -> Iterator[SqlStore]:
    with open_store(where) as opened:
        yield opened


def leg(at: float = 1.0, ttft: float = 3.0, **changes: object) -> LegResult:
    samples = tuple(SampleInfo(ttft + off, (1.0, 1.5)) for off in (-1.0, 0.0, 7.0))
    provenance = {"artifact": "f00", "commit": "abc"}
    return replace(a_leg(at), **{"samples": samples, "provenance": provenance} | changes)  # type: ignore[arg-type]


def a_cell(
    metric: str = "ttft", comparison: str = GATE, verdict: str = "PASS", device: str = "host"
) -> GateCell:
    return GateCell(
        id=f"{device}/tiny-gemma3/p8+n4/{metric}",
        comparison=comparison,
        device=device,
        model="tiny-gemma3",
        workload="p8+n4",
        metric=metric,
        title="Time to first token",
        unit="ms",
        exact=False,
        gating=True,
        advisory="",
        margin=0.05,
        verdict=verdict,  # type: ignore[arg-type]
        reason="",
        baseline=10.0,
        candidate=10.5,
        blocks=(0.04, 0.05),
        estimate=0.05,
        low=0.03,
        high=0.07,
        sd=0.01,
        p=0.002,
    )


def a_gate(*cells: GateCell, sides: tuple[Side, Side] = (OLD, NEW), **changes: object) -> GateInfo:
    gate = GateInfo(
        kind="gate",
        plan_key="key",
        baseline=sides[0],
        candidate=sides[1],
        comparisons=(Comparison(GATE),),
        looks=(4, 8),
        alpha=0.01,
        level=0.005,
        planned_cells=len(cells),
        settings="defaults",
        verdict="PASS",
        exit_code=0,
        cells=cells,
    )
    return replace(gate, **changes)  # type: ignore[arg-type]


def nights(store: SqlStore) -> None:
    for number, started in enumerate(NIGHTS):
        store.begin_run(a_run(f"n{number}", started))
        store.add_leg(f"n{number}", leg(ttft=10.0 + number))


# -- history ---------------------------------------------------------------------------------------


def test_a_point_is_the_median_of_the_legs_medians_of_their_repeats(store: SqlStore) -> None:
    store.begin_run(a_run())
    for at, ttft in ((1.0, 3.0), (2.0, 5.0), (3.0, 4.0)):
        store.add_leg("r1", leg(at, ttft))
    points = {row.metric: row for row in store.history()}
    assert {name: (row.value, row.unit, row.legs) for name, row in points.items()} == {
        "ttft": (4.0, "ms", 3),
        "decode": (1.25, "ms", 3),
        "tokens_per_s": (800.0, "tokens/s", 3),
        "memory": (float(1 << 20), "bytes", 3),
    }
    point = points["ttft"]
    assert (point.at, point.run_id, point.device, point.recipe) == (STARTED, "r1", "host", "hybrid")
    assert (point.model, point.workload) == ("tiny-gemma3", "prompt 8 + 4 new")
    assert (point.validity, point.arm, point.artifact, point.commit) == ("VALID", "", "f00", "abc")


def test_history_is_newest_first_and_can_be_cut(store: SqlStore) -> None:
    nights(store)
    assert [row.value for row in store.history(metric="ttft")] == [12.0, 11.0, 10.0]
    assert [row.run_id for row in store.history(metric="ttft", limit=2)] == ["n2", "n1"]
    assert [row.run_id for row in store.history(metric="ttft", since="2026-01-02")] == ["n2", "n1"]
    assert [row.run_id for row in store.history(metric="ttft", since="2026-01-03T23:00+01:00")] == ["n2"]
    assert [row.run_id for row in store.history(metric="ttft", until=NIGHTS[1])] == ["n1", "n0"]


def test_of_each_cell_the_newest_runs_that_measured_it(store: SqlStore) -> None:
    """What was not measured lately has its newest ones all the same; all legs of a run count as one."""
    nights(store)
    store.add_leg("n2", leg(2.0, ttft=13.0))
    for number in (0, 1):
        store.add_leg(f"n{number}", replace(leg(ttft=20.0 + number), recipe="rare"))
    newest = store.history(metric="ttft", newest=1)
    assert [(row.run_id, row.recipe, row.value, row.legs) for row in newest] == [
        ("n2", "hybrid", 12.5, 2),
        ("n1", "rare", 21.0, 1),
    ]
    until = store.history(metric="ttft", newest=1, until=NIGHTS[0])
    assert [(row.run_id, row.recipe) for row in until] == [("n0", "hybrid"), ("n0", "rare")]
    assert len(store.history(metric="ttft", newest=2)) == 4


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"device": "phone"}, {"phone"}),
        ({"device": "ho*"}, {"host"}),
        ({"device": "*"}, {"host", "phone", "p_one"}),
        ({"device": "p_o*"}, {"p_one"}),  # _ and % mean themselves
        ({"device": "HO*"}, set()),
        ({"recipe": "static"}, {"phone"}),
        ({"model": "big"}, {"p_one"}),
        ({"workload": "*8 + 4*"}, {"host", "phone", "p_one"}),
        ({"metric": "energy"}, {"phone"}),
        ({"device": "host", "recipe": "static"}, set()),
    ],
)
def test_history_of_what_is_named(store: SqlStore, chosen: dict[str, str], expected: set[str]) -> None:
    store.begin_run(a_run())
    store.add_leg("r1", leg())
    store.add_leg("r1", leg(device="phone", recipe="static", energy=EnergyInfo("rails", "", 0.5, 0.75)))
    store.add_leg("r1", leg(device="p_one", model="big"))
    assert {row.device for row in store.history(**chosen)} == expected  # type: ignore[arg-type]


def test_only_the_best_legs_make_a_point(store: SqlStore) -> None:
    store.begin_run(a_run())
    store.add_leg("r1", leg(1.0, 10.0, validity="NOISY"))
    store.add_leg("r1", leg(2.0, 90.0, validity="INVALID"))
    (row,) = store.history(metric="ttft")
    assert (row.value, row.validity, row.legs) == (10.0, "NOISY", 1)
    store.add_leg("r1", leg(3.0, 20.0))
    (row,) = store.history(metric="ttft")
    assert (row.value, row.validity, row.legs) == (20.0, "VALID", 1)


def test_what_is_no_number_makes_no_point(store: SqlStore) -> None:
    store.begin_run(a_run())
    store.add_leg("r1", leg(samples=(), peak_rss_bytes=0))
    store.add_leg("r1", leg(2.0, samples=(SampleInfo(float("nan"), ()),), peak_rss_bytes=0))
    assert store.history() == ()


def test_baseline_and_candidate_are_apart_and_what_was_altered_is_no_history(store: SqlStore) -> None:
    store.begin_run(a_run())
    places = [
        Place(GATE, "p8", 0, -1, "canary"),
        Place(GATE, "p8", 0, 0, "baseline"),
        Place(GATE, "p8", 0, 1, "candidate"),
        Place(AA, "p8", 0, 0, "baseline"),
        Place("+5 %", "p8", 0, 1, "candidate"),
        Place("warm-up", "p8", 0, 0, "baseline"),
    ]
    for number, place in enumerate(places):
        store.add_leg("r1", leg(number, 10.0 * (number + 1), place=place))
    found = {row.arm: (row.value, row.legs) for row in store.history(metric="ttft")}
    assert found == {"baseline": (30.0, 2), "candidate": (30.0, 1)}


def test_in_a_gate_only_a_process_weighed_by_itself_tells_the_memory(store: SqlStore) -> None:
    store.begin_run(a_run())
    timed = leg(1.0, place=Place(GATE, "p8", 0, 1, "candidate"), peak_rss_bytes=900)
    weighing = Place(GATE, "p8", 0, 5, "candidate")
    weighed = leg(2.0, place=weighing, peak_rss_bytes=700, memory_pass=True, samples=())
    store.add_leg("r1", timed)
    store.add_leg("r1", weighed)
    found = {row.metric: (row.value, row.legs) for row in store.history()}
    assert (found["memory"], found["ttft"]) == ((700.0, 1), (3.0, 1))


def test_a_drill_is_no_history_and_says_so_elsewhere(store: SqlStore) -> None:
    drill = {"DRILL": "the candidate is slowed down"}
    store.begin_run(replace(a_run(), provenance=drill, gate=a_gate(a_cell())))
    store.add_leg("r1", leg())
    assert store.history() == ()
    assert store.runs()[0].drill == store.gates()[0].drill == store.gate_cells()[0].drill == drill["DRILL"]


def test_a_gate_into_which_a_loss_was_injected_is_a_drill_and_a_calibration_is_none(store: SqlStore) -> None:
    slower = (Comparison(GATE, Injection(slowdown=0.05)),)
    for kind in ("gate", "calibration"):
        store.begin_run(replace(a_run(kind), gate=a_gate(a_cell(), comparisons=slower, kind=kind)))
        store.add_leg(kind, leg(place=Place(GATE, "p8", 0, 1, "candidate")))
    assert {run.run_id for run in store.gates() if run.drill} == {"gate"}
    assert {row.run_id for row in store.history()} == {"calibration"}


def test_a_gate_that_calls_itself_a_drill_is_one(store: SqlStore) -> None:
    store.begin_run(replace(a_run(), gate=replace(a_gate(), drill="a wrong window")))
    store.add_leg("r1", leg(place=Place(GATE, "p8", 0, 1, "candidate")))
    assert (store.history(), store.gates()[0].drill) == ((), "a wrong window")


@pytest.mark.parametrize("since", ["yesterday", "", "2026-13-01"])
def test_a_time_that_is_none_is_told(store: SqlStore, since: str) -> None:
    with pytest.raises(StoreError, match="sought a date like 2026-01-31"):
        store.history(since=since)


def test_a_metric_that_is_none_is_told(store: SqlStore) -> None:
    with pytest.raises(StoreError, match="sought one of the metrics ttft, decode, tokens_per_s"):
        store.history(metric="speed")  # type: ignore[arg-type]


# -- gates -----------------------------------------------------------------------------------------


def test_a_gate_is_kept_with_its_cells(store: SqlStore) -> None:
    gate = a_gate(a_cell("ttft"), a_cell("decode", verdict="REGRESSED"), verdict="REGRESSED", exit_code=1)
    store.begin_run(replace(a_run(), gate=gate, tags=("v1.2",)))
    assert store.results("r1").gate == gate
    (summary,) = store.gates()
    assert (summary.run_id, summary.verdict, summary.exit_code) == ("r1", "REGRESSED", 1)
    assert (summary.baseline, summary.candidate, summary.planned_cells) == ("static", "hybrid", 2)
    (ttft, decode) = store.gate_cells()
    assert (ttft.metric, ttft.verdict, decode.metric, decode.verdict) == (
        "ttft",
        "PASS",
        "decode",
        "REGRESSED",
    )
    assert (ttft.device, ttft.recipe, ttft.model, ttft.workload) == ("host", "hybrid", "tiny-gemma3", "p8+n4")
    assert (ttft.ratio, ttft.low, ttft.high, ttft.sd, ttft.p) == (0.05, 0.03, 0.07, 0.01, 0.002)
    assert (ttft.margin, ttft.blocks, ttft.baseline, ttft.candidate) == (0.05, 2, 10.0, 10.5)
    assert (ttft.aa, ttft.gating, ttft.waived, ttft.kind, ttft.tags) == (
        False,
        True,
        False,
        "gate",
        ("v1.2",),
    )


def test_a_later_look_replaces_what_an_earlier_one_said(store: SqlStore) -> None:
    store.begin_run(replace(a_run(), gate=a_gate(a_cell(verdict="INCONCLUSIVE"), a_cell("decode"))))
    store.begin_run(replace(a_run(), gate=a_gate(a_cell(verdict="PASS"))))
    assert [(cell.metric, cell.verdict) for cell in store.gate_cells()] == [("ttft", "PASS")]
    assert len(store.gates()) == 1


@pytest.mark.parametrize(
    ("sides", "comparison", "aa"),
    [
        ((OLD, NEW), Comparison(GATE), False),
        ((OLD, OLD), Comparison(GATE), True),
        ((OLD, replace(OLD, session='{"threads":2}')), Comparison(GATE), False),
        ((OLD, OLD), Comparison(AA), True),
        ((OLD, OLD), Comparison("+5 %", Injection(0.05, 0.05)), False),
    ],
)
def test_a_cell_is_an_aa_where_nothing_differs(
    store: SqlStore, sides: tuple[Side, Side], comparison: Comparison, aa: bool
) -> None:
    gate = a_gate(a_cell(comparison=comparison.name), sides=sides, comparisons=(comparison,))
    store.begin_run(replace(a_run(), gate=gate))
    assert [cell.aa for cell in store.gate_cells()] == [aa]
    assert len(store.gate_cells(aa=aa)) == 1
    assert store.gate_cells(aa=not aa) == ()
    same = sides[0] == sides[1]
    assert store.gates()[0].aa == same
    assert (len(store.headers(aa=same)), len(store.headers(aa=not same))) == (1, 0)


def test_gates_can_be_chosen(store: SqlStore) -> None:
    for number, (kind, started) in enumerate(zip(("gate", "calibration", "gate"), NIGHTS, strict=True)):
        gate = a_gate(a_cell(), a_cell(device="phone"), kind=kind, plan_key=f"k{number}")
        store.begin_run(replace(a_run(f"n{number}", started), gate=gate))
    store.begin_run(a_run("no gate"))
    store.finish_run("n0", "2026-01-05T00:00:00+00:00")
    assert [gate.run_id for gate in store.gates()] == ["n2", "n1", "n0"]
    assert [gate.run_id for gate in store.gates(kind="gate", limit=1)] == ["n2"]
    assert [gate.run_id for gate in store.gates(since="2026-01-02")] == ["n2", "n1"]
    assert [cell.run_id for cell in store.gate_cells(device="phone", limit=2)] == ["n2", "n1"]
    assert {cell.device for cell in store.gate_cells(run_id="n1")} == {"host", "phone"}
    assert [run.run_id for run in store.headers(kind="calibration")] == ["n1"]
    assert [run.run_id for run in store.headers(plan_key="k2", finished=False)] == ["n2"]
    assert store.headers(plan_key="k0", finished=False) == ()
    assert [run.run_id for run in store.headers(finished=True)] == ["n0"]
    assert len(store.headers()) == 4


# -- names of runs ---------------------------------------------------------------------------------


def test_tags_come_with_the_run_and_later(store: SqlStore) -> None:
    store.begin_run(replace(a_run(), tags=("v1.2", "stable")))
    store.add_tag("r1", "signed")
    store.add_tag("r1", "signed")
    store.begin_run(replace(a_run(), tags=("v1.2",)))  # a header again takes none away
    store.add_leg("r1", leg())
    tags = ("v1.2", "stable", "signed")
    assert store.results("r1").tags == tags
    assert store.headers()[0].tags == store.runs()[0].tags == store.history()[0].tags == tags


def test_a_name_means_an_id_then_the_newest_run_with_the_tag_then_the_newest_of_the_commit(
    store: SqlStore,
) -> None:
    for number, started in enumerate(NIGHTS):
        store.begin_run(
            replace(a_run(f"n{number}", started), provenance={"commit": "c0ffee" if number < 2 else "abc"})
        )
    assert store.find("v1") is None
    assert store.find("v1", "c0ffee") == "n1"
    store.add_tag("n0", "v1")
    assert store.find("v1", "c0ffee") == "n0"
    store.add_tag("n2", "v1")
    assert store.find("v1") == "n2"
    store.add_tag("n2", "n0")
    assert store.find("n0") == find_run("n0", store) == "n0"


def test_a_run_that_is_not_there_gets_no_tag(store: SqlStore) -> None:
    with pytest.raises(StoreError, match="sought run 'r9', found no runs"):
        store.add_tag("r9", "v1")


@pytest.mark.parametrize("name", ["", "v 1", "run:1", "a,b", "-v", "x" * 101, "v1\n"])
def test_a_tag_that_no_ref_could_name_is_refused(name: str) -> None:
    with pytest.raises(HarnessError, match="sought a tag of"):
        tags_of([name])


def test_a_tag_that_would_mean_a_recipe_is_refused() -> None:
    assert tags_of(["v1.2", "release/7", "v1.2"]) == ("v1.2", "release/7")
    with pytest.raises(HarnessError, match="found the recipe 'hybrid'"):
        tags_of(["hybrid"])


def test_the_newest_checks_of_a_recipe_are_found_and_a_drill_s_are_none(store: SqlStore) -> None:
    for number, provenance in enumerate(({"commit": "abc"}, {"commit": "abd", DRILL: "a mutant"})):
        store.begin_run(replace(a_run(f"n{number}", NIGHTS[number]), provenance=provenance))
        store.add_check(f"n{number}", a_check())
    sought = {"device": a_check().device, "recipe": a_check().recipe, "model": a_run().model}
    found = store.checks(**sought)
    assert found is not None
    assert (found.run_id, found.at, found.commit) == ("n0", NIGHTS[0], "abc")
    assert found.checks == (a_check(),)
    for name in sought:
        assert store.checks(**{**sought, name: "another"}) is None


def test_a_run_s_devices_can_be_asked_for_alone(store: SqlStore) -> None:
    store.begin_run(a_run())
    store.add_device("r1", a_device())
    assert store.devices("r1") == (a_device(),)
    assert store.devices("r2") == ()


def test_durations_are_of_the_newest_finished_runs_of_the_model(store: SqlStore) -> None:
    runs = (("old", NIGHTS[0]), ("new", NIGHTS[1]), ("newest", NIGHTS[2]))
    for number, (run_id, started) in enumerate(runs, 1):
        store.begin_run(replace(a_run(run_id, started), finished_at=None))
        store.add_check(run_id, replace(a_check(), seconds=float(number)))
        store.add_check(run_id, replace(a_check(), check="test_gone", outcome="infrastructure"))
        store.add_leg(run_id, replace(leg(), load_ms=1000.0 * number))
        store.finish_run(run_id, started)
    store.begin_run(replace(a_run("interrupted", NIGHTS[2]), finished_at=None))
    store.add_check("interrupted", replace(a_check(), seconds=9.0))
    store.begin_run(replace(a_run("other", NIGHTS[2]), model="other"))
    store.add_check("other", replace(a_check(), seconds=9.0))

    found = store.durations("tiny-gemma3", 2)
    name = (a_check().device, a_check().recipe, a_check().check)
    assert sorted(found.checks) == [(*name, 2.0), (*name, 3.0)]
    repeats = 3 * (3.0 + 1.0 + 1.5) + 6.0  # ms; the repeats' first tokens are off by -1, 0 and 7
    assert {device for device, _ in found.legs} == {"host"}
    assert sorted(s for _, s in found.legs) == pytest.approx([each + repeats / 1e3 for each in (2.0, 3.0)])


# -- how it is asked -------------------------------------------------------------------------------


def test_every_question_is_answered_by_an_index(store: SqlStore) -> None:
    """With 100,000 legs whatever reads a whole table of results to find a few is too slow."""
    store.begin_run(replace(a_run(), gate=a_gate(a_cell()), tags=("v1",)))
    store.add_device("r1", a_device())
    store.add_check("r1", a_check())
    store.add_leg("r1", leg())
    store.finish_run("r1", STARTED)
    asked: list[tuple[str, object]] = []
    with listening(store, asked):
        store.results("r1")
        store.history(device="host", metric="ttft")
        store.history(since="2026-01-01", limit=1)
        store.gate_cells(run_id="r1")
        store.gate_cells(device="host", metric="ttft")
        store.headers(plan_key="key", finished=False, limit=1)
        store.headers(kind="calibration", limit=30)
        store.find("v1", "abc")
        store.latest()
        store.runs()
        store.canaries("host")
        store.devices("r1")
        assert store.durations("tiny-gemma3", 5).legs
        assert store.checks(device="host", recipe=a_check().recipe, model=a_run().model) is not None
    results = ("devices", "checks", "legs", "measured", "infrastructure", "gate_cells")
    scans = [scan for question in asked for scan in whole_tables(store, *question) if scan in results]
    assert len(asked) >= 10
    assert scans == []
    # And the check can see one.
    assert whole_tables(store, "SELECT payload FROM legs WHERE payload = 'x'", ()) == ["legs"]


class listening:
    """Notes every SELECT with its parameters."""

    def __init__(self, store: SqlStore, asked: list[tuple[str, object]]) -> None:
        self._engine, self._asked = store._engine, asked

    def __enter__(self) -> None:
        event.listen(self._engine, "before_cursor_execute", self._note)

    def __exit__(self, *_: object) -> None:
        event.remove(self._engine, "before_cursor_execute", self._note)

    def _note(
        self, connection: object, cursor: object, statement: str, parameters: object, *_: object
    ) -> None:
        if statement.startswith("SELECT"):
            self._asked.append((statement, parameters))


def whole_tables(store: SqlStore, statement: str, parameters: object) -> list[str]:
    """Tables that the plan reads row by row from one end to the other."""
    with store._engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)  # type: ignore[arg-type]
            steps = [row[3] for row in plan]
            return [s.split()[1] for s in steps if s.startswith("SCAN") and "USING" not in s]
        # Small tables are quicker without an index; here we ask whether there is one.
        connection.execute(text("SET LOCAL enable_seqscan = off"))
        lines = [row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)]  # type: ignore[arg-type]
        return [line.split("Seq Scan on ")[1].split()[0] for line in lines if "Seq Scan on " in line]
