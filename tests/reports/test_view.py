"""The view model: what the tables, the failures and the provenance say."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import replace

import pytest

from kvengine.program import Operation, Program
from reports import text
from reports.correctness import Absent, CheckCell
from reports.measurements import METRICS, MeasureGroup
from reports.page import html
from reports.programs import program_view
from reports.results import ClusterInfo, NotPlanned, SampleInfo, TopLogits, VitalsInfo
from reports.view import ReportView, build_view
from tests.reports.parsed import Page
from tests.reports.sample import (
    AFTER,
    BEFORE,
    CHECKS,
    DIVERGENCE,
    HOST,
    LOST,
    MIB,
    PHONE,
    PROGRAM,
    SMALL,
    check,
    device,
    failed_check,
    leg,
    run,
    sample_run,
    samples,
    stopped_check,
)


@pytest.fixture(scope="module")
def sample() -> ReportView:
    return build_view(sample_run())


def metric(group: MeasureGroup, recipe: str, title: str) -> tuple[str, str, str]:
    row = next(row for row in group.rows if row.recipe == recipe)
    shown = row.metrics[[column.title for column in METRICS].index(title)]
    return shown.value, shown.detail, shown.cue


def first_cell(view: ReportView) -> CheckCell:
    cell = view.grids[0].rows[0].cells[0]
    assert cell is not None
    return cell


def test_every_device_and_recipe_has_its_place(sample: ReportView) -> None:
    assert [row.device.name for row in sample.overview] == [HOST, PHONE, LOST]
    assert [recipe.name for recipe in sample.recipes] == [BEFORE, AFTER, SMALL]
    assert [grid.device.name for grid in sample.grids] == [HOST, PHONE, LOST]
    assert [group.device.name for group in sample.measures] == [HOST, PHONE, LOST]


def test_devices_and_recipes_that_only_results_name_are_shown_too() -> None:
    view = build_view(run(checks=(check("unlisted", "adhoc"),), legs=()))
    assert [d.name for d in view.devices] == [HOST, "unlisted"]
    assert [recipe.name for recipe in view.recipes] == [AFTER, "adhoc"]


def test_the_overview_shows_the_worst_outcome_and_the_gaps(sample: ReportView) -> None:
    outcomes = [
        [cell if isinstance(cell, Absent) else (cell.outcome, cell.passed, cell.total) for cell in row.cells]
        for row in sample.overview
    ]
    assert outcomes == [
        [("passed", 6, 6), ("passed", 6, 6), ("failed", 5, 6)],
        [("passed", 6, 6), ("failed", 5, 6), ("passed", 6, 6)],
        [("infrastructure", 5, 6), Absent(""), Absent("")],
    ]


def test_what_was_never_planned_says_so_with_the_reason() -> None:
    why = "farm.toml: galaxy-s24 is for recipes before-*"
    view = build_view(sample_run(not_planned=(NotPlanned(LOST, AFTER, why),)))
    assert view.overview[2].cells[1:] == (Absent(why), Absent(""))
    page = Page(html(sample_run(not_planned=(NotPlanned(LOST, AFTER, why),))))
    cells = [e.words for e in page.all("td") if "not planned" in e.words or "no result" in e.words]
    assert cells == [f"not planned {why}", "○ no result"]


def test_a_passed_cell_shows_error_tolerance_and_programs() -> None:
    view = build_view(run(checks=(check(worst_error=2.5e-5, tolerance=1e-4, programs=40),)))
    cell = first_cell(view)
    assert (cell.error, cell.tolerance, cell.programs, cell.share) == ("2.5e-05", "1.0e-04", 40, 25.0)


def test_a_failed_cell_shows_the_error_that_failed_it_and_links_to_it() -> None:
    view = build_view(run(checks=(failed_check(),)))
    cell = first_cell(view)
    assert (cell.outcome, cell.error, cell.share) == ("failed", "3.1e-01", None)
    assert cell.anchor == view.failures[0].anchor


def test_parametrized_checks_share_a_cell_and_the_worst_wins() -> None:
    results = (
        check(worst_error=1e-6),
        check(worst_error=5e-5),
        stopped_check(HOST),
        failed_check(name=next(iter(CHECKS))),
    )
    cell = first_cell(build_view(run(checks=results)))
    assert cell.outcome == "failed"
    assert cell.programs == 237


def test_nan_is_the_worst_error() -> None:
    broken = failed_check(divergence=replace(DIVERGENCE, error=math.nan))
    assert first_cell(build_view(run(checks=(broken,)))).error == "NaN"


def test_p99_of_few_gaps_is_only_too_small() -> None:
    few = leg(samples=samples(700, 25, new_tokens=221, repeats=3))  # 660 gaps
    (group,) = build_view(run(legs=(few,))).measures
    assert metric(group, AFTER, "ITL p99") == ("n too small", "n 660, needs 662", "")
    assert metric(group, AFTER, "ITL p95")[0].endswith(" ms")
    enough = leg(samples=samples(700, 25, new_tokens=222, repeats=3))  # 663 gaps
    (group,) = build_view(run(legs=(enough,))).measures
    assert metric(group, AFTER, "ITL p99")[0].endswith(" ms")


def test_the_measurement_row() -> None:
    made = leg(
        samples=(SampleInfo(700.0, (20.0, 30.0)), SampleInfo(720.0, (25.0, 25.0))),
        load_ms=1800.0,
        peak_rss_bytes=1500 * MIB,
        kv_bytes=26 * MIB,
    )
    (group,) = build_view(run(legs=(made,))).measures
    shown = {column.title: metric(group, AFTER, column.title)[:2] for column in METRICS}
    assert shown == {
        "Load": ("1,800 ms", ""),
        "TTFT": ("710 ms", "700–720, n 2"),
        "ITL p50": ("25.0 ms", "n 4"),
        "ITL p95": ("n too small", "n 4, needs 130"),
        "ITL p99": ("n too small", "n 4, needs 662"),
        "Decode": ("40.0 tok/s", ""),
        "Of bandwidth": ("not measured", ""),
        "Peak RSS": ("1.46 GiB", ""),
        "KV cache": ("26 MiB", ""),
    }


def test_only_valid_rows_are_best_or_worst() -> None:
    fast = samples(100, 5)
    legs = (leg(recipe=BEFORE), leg(recipe=AFTER), leg(recipe=SMALL, validity="NOISY", samples=fast))
    (group,) = build_view(run(legs=legs)).measures
    assert [metric(group, recipe, "TTFT")[2] for recipe in (AFTER, BEFORE, SMALL)] == ["best", "worst", ""]
    assert [metric(group, recipe, "Decode")[2] for recipe in (AFTER, BEFORE, SMALL)] == ["best", "worst", ""]


def test_one_invalid_leg_makes_its_row_invalid_with_every_reason() -> None:
    legs = (leg(), leg(validity="INVALID"), leg(validity="NOISY"))
    (group,) = build_view(run(legs=legs)).measures
    assert group.rows[0].validity == "INVALID"
    assert group.rows[0].reasons == ("battery charging", "load average 1.9 on 2 cores")


def test_different_workloads_are_never_in_one_table() -> None:
    legs = (leg(), leg(workload="prompt 512 + 64 new"), leg(model="another"))
    assert len(build_view(run(legs=legs)).measures) == 3


def test_failures_and_infrastructure_errors_are_apart(sample: ReportView) -> None:
    assert [(p.device.name, p.recipe) for p in sample.failures] == [(HOST, SMALL), (PHONE, AFTER)]
    assert [(p.device.name, p.recipe) for p in sample.infrastructure] == [(LOST, BEFORE)]
    assert "lowmemorykiller" in sample.infrastructure[0].stderr_tail


def test_the_program_reads_operation_by_operation() -> None:
    (failure,) = build_view(run(checks=(failed_check(),))).failures
    assert failure.program is not None
    assert failure.program.setting == "A fresh decoder with capacity 24 tokens, the artifact's slack"
    assert [(op.index, op.kind, op.text) for op in failure.program.operations] == [
        (0, "prefill", "append 7 tokens in chunks of 3, logits of every token"),
        (1, "poison", "fill every dead cache row with NaN"),
        (2, "decode", "append 3 tokens, one step each"),
        (3, "generate", "append token 8, then 4 greedy tokens"),
    ]
    assert [op.index for op in failure.program.operations if op.differs] == [2]
    assert [token.id for token in failure.program.operations[2].tokens if token.differs] == ["40"]


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (
            {"kind": "prefill", "tokens": [1], "chunk": 0, "logits": "last"},
            "append 1 token in one shot, logits of the last",
        ),
        ({"kind": "reset"}, "forget everything"),
        ({"kind": "rewind", "count": 3}, "drop the newest 3 tokens"),
        ({"kind": "fork", "name": "a"}, "under the name a"),
        ({"kind": "switch", "name": "a"}, "go on in the state a"),
        ({"kind": "save", "name": "s"}, "to slot s"),
        ({"kind": "load", "name": "s"}, "by slot s"),
        ({"kind": "newer", "depth": 4}, '{"depth": 4}'),
    ],
)
def test_every_operation_has_words(operation: dict[str, object], said: str) -> None:
    program = json.dumps({"capacity": 8, "operations": [operation]})
    (failure,) = build_view(run(checks=(failed_check(program=program),))).failures
    assert failure.program is not None
    assert said in failure.program.operations[0].text


@pytest.mark.parametrize(
    "broken", ["{", "[]", '{"operations": 3}', '{"operations": [{}], "capacity": 1}', "null"]
)
def test_a_program_that_cannot_be_read_is_shown_raw(broken: str) -> None:
    (failure,) = build_view(run(checks=(failed_check(program=broken),))).failures
    assert failure.program is not None
    assert failure.program.operations == ()
    assert failure.program.raw == broken


def test_both_top_logits_stand_side_by_side() -> None:
    (failure,) = build_view(run(checks=(failed_check(),))).failures
    assert failure.divergence is not None
    first, _, third, *_ = failure.divergence.logits
    assert (first.expected_token, first.found_token, first.differs) == ("311", "17", True)
    assert (third.expected, third.found, third.differs) == ("7.0032", "7.0150", False)
    assert ("Layer", "3") in failure.divergence.place


def test_an_unknown_layer_and_nan_logits_are_said() -> None:
    nan = replace(DIVERGENCE, layer=None, found=TopLogits((0,), (math.nan,)))
    (failure,) = build_view(run(checks=(failed_check(divergence=nan),))).failures
    assert failure.divergence is not None
    assert ("Layer", "not located") in failure.divergence.place
    assert failure.divergence.logits[0].found == "NaN"
    assert failure.divergence.logits[4].found_token == text.MISSING


def test_vitals_that_cannot_be_read_are_left_out() -> None:
    made = leg(
        vitals_before=VitalsInfo(at=0.0, battery_percent=80.0), vitals_after=VitalsInfo(at=1.0, load_1m=0.5)
    )
    assert build_view(run(legs=(made,))).legs[0].vitals == (
        ("Battery", "80 %", text.MISSING),
        ("Load, 1 min", text.MISSING, "0.50"),
    )


def test_nodes_by_provider_are_in_the_provenance_of_a_leg() -> None:
    made = leg(nodes_by_provider={"XnnpackExecutionProvider": 31, "CPUExecutionProvider": 381})
    facts = dict(build_view(run(legs=(made,))).legs[0].facts)
    assert facts["Nodes by provider"] == "XnnpackExecutionProvider 31, CPUExecutionProvider 381"


def test_many_devices_start_folded_unless_something_is_wrong() -> None:
    devices = tuple(device(f"phone-{n}") for n in range(4))
    checks = (*(check(d.name) for d in devices[:3]), failed_check("phone-3"))
    assert [g.open for g in build_view(run(devices=devices, checks=checks)).grids] == [
        False,
        False,
        False,
        True,
    ]


def test_the_sample_program_is_one_the_engine_takes() -> None:
    from kvengine.program import Program

    assert len(Program.from_json(PROGRAM).operations) == 4


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.number(1240.4), "1,240"),
        (text.number(0.1234), "0.123"),
        (text.number(math.inf), "–"),
        (text.milliseconds(12_500), "12.5 s"),
        (text.byte_size(26 * MIB), "26 MiB"),
        (text.byte_size(1536), "1.50 KiB"),
        (text.byte_size(900), "900 B"),
        (text.error_size(0.0), "0"),
        (text.error_size(None), "–"),
        (text.seconds(4.21), "4.2 s"),
        (text.seconds(185), "3 min 05 s"),
        (text.seconds(7800), "2 h 10 min"),
        (text.moment("2025-11-23T16:06:11+02:00"), "23 Nov 2025, 14:06 UTC"),
        (text.moment("yesterday"), "yesterday"),
        (text.elapsed("2025-11-23T14:06:11+00:00", "2025-11-23T14:12:48+00:00"), "6 min 37 s"),
        (text.elapsed("2025-11-23T14:06:11+00:00", None), ""),
        (text.joined(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected


def test_a_check_judged_by_kl_shows_the_divergence_and_its_limit() -> None:
    judged = check(worst_error=0.5, tolerance=None, mean_kl=0.002, kl_tolerance=0.02)
    cell = first_cell(build_view(run(checks=(judged,))))
    assert (cell.error, cell.tolerance) == ("KL 2.0e-03", "2.0e-02")
    assert cell.share == pytest.approx(10)


def test_a_check_that_was_never_planned_for_a_recipe_does_not_apply() -> None:
    checks = (check(recipe=BEFORE), check(recipe=AFTER), check(recipe=AFTER, check="only_hybrid"))
    planned = build_view(run(checks=checks, planned_checks=3)).grids[0]
    assert planned.recipes == (AFTER, BEFORE)
    assert [cell is None for cell in planned.rows[1].cells] == [False, True]
    short = build_view(run(checks=checks, planned_checks=4)).grids[0]
    cell = short.rows[1].cells[1]
    assert cell is not None
    assert cell.outcome == "not_run"


def test_a_device_shows_what_is_told_of_it_and_no_more() -> None:
    clusters = (ClusterInfo(1_704_000, (0, 1, 2, 3)), ClusterInfo(2_914_000, (4, 5, 6, 7)))
    told = device(
        PHONE, serial="39121F", api_level=36, clusters=clusters, thermal_sensors=("SKIN",), battery=True
    )
    phone, host = (view.facts for view in build_view(run(devices=(told, device(HOST)))).devices)
    assert (
        dict(phone).items()
        >= {
            "Serial": "39121F",
            "API level": "36",
            "Cores": "8: 4 at 1.70 GHz, 4 at 2.91 GHz",
            "Thermal sensors": "SKIN",
            "Battery": "yes",
        }.items()
    )
    assert dict(host)["Cores"] == "2"
    assert not {"Serial", "API level", "Battery", "Thermal sensors"} & set(dict(host))


def test_every_operation_is_told_in_words() -> None:
    kinds = [kind for member in typing.get_args(Operation) for kind in typing.get_args(member) or (member,)]
    operations = []
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        values = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
        missing = {"tokens": (1,), "token": 1, "count": 2, "name": "a", "at": 3, "layer": 0, "keep": 4}
        given = {name: missing[name] for name in values if name in missing}
        operations.append(kind(**given, **({"order": (0,)} if "order" in values else {})))
    view = program_view(Program(9, tuple(operations)).to_json(), None)
    assert len(view.operations) == len(kinds) > 15
    assert not [operation.text for operation in view.operations if "{" in operation.text]
