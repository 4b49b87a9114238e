"""What all A/A in the store adds up to: error rates, block SD, and who loses its gating rights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.gate.calibration import blocks_taken, calibration_info, waiting
from harness.gate.statistics import proportion
from harness.store.rows import same
from reports.gate_results import (
    AA,
    BlockInfo,
    CalibratedCell,
    Comparison,
    GateCell,
    GateInfo,
    GateVerdict,
    Injection,
    Side,
)
from reports.results import RunResults
from tests.reports.gate_sample import gate_cell
from tests.reports.sample import run

QUIET = (0.001, -0.001, 0.0005, -0.0005)
BIASED = (0.021, 0.02, 0.019, 0.02)  # under the margin of 3 %, and never 0
WILD = (0.09, -0.08, 0.1, -0.11)
SIDE = Side("static", "static", "a" * 64, "{}")


def aa(blocks: tuple[float, ...], verdict: GateVerdict = "PASS", metric: str = "decode") -> GateCell:
    cell = gate_cell("host", metric, verdict, 0.0)
    return replace(cell, comparison=AA, blocks=blocks)


def gate(
    *cells: GateCell, slots: int = 0, comparisons: tuple[Comparison, ...] = (Comparison(AA),)
) -> GateInfo:
    blocks = tuple(
        BlockInfo("host", AA, cells[0].workload, index, "ABBA", (), 0.0, 0.0, {})
        for index in range(len(cells[0].blocks))
    )
    return GateInfo(
        kind="calibration",
        plan_key="k",
        baseline=SIDE,
        candidate=SIDE,
        comparisons=comparisons,
        looks=(len(cells[0].blocks),) if slots else (4,),
        alpha=0.01,
        level=0.01 / 3,
        planned_cells=len(cells),
        settings="defaults",
        cells=cells,
        blocks=blocks,
        slots=slots,
    )


def runs(*gates: GateInfo) -> list[RunResults]:
    """Stored runs, newest first; ``gates`` are from the oldest on."""
    return [replace(run(), run_id=f"r{n}", gate=g) for n, g in enumerate(gates)][::-1]


def only(found: list[RunResults]) -> CalibratedCell:
    info = calibration_info(found)
    assert info is not None
    (cell,) = info.cells
    return cell


def test_a_whole_run_is_one_verdict_as_the_gate_gave_it() -> None:
    found = calibration_info(runs(gate(aa(QUIET)), gate(aa(BIASED, "REGRESSED")), gate(aa(QUIET))))
    assert found is not None
    assert (found.trials, found.false_regressed) == (3, 1)
    assert (found.false_low, found.false_high) == proportion(1, 3)


def test_blocks_of_nights_add_up_to_verdicts() -> None:
    nights = [gate(aa((block,)), slots=4) for block in (*QUIET, *QUIET, 0.001)]
    cell = only(runs(*nights))
    assert (cell.trials, cell.false_regressed, cell.blocks, cell.waiting, cell.size) == (2, 0, 9, 1, 4)
    assert waiting(runs(*nights)) == {"host/gemma-3-1b/p128+n64/decode": (0.001,)}
    assert blocks_taken(runs(*nights)) == {("host", "p128+n64"): 9}


def test_what_is_over_after_a_verdict_goes_on_to_the_next() -> None:
    nights = [gate(aa(QUIET[:3]), slots=4) for _ in range(2)]
    cell = only(runs(*nights))
    assert (cell.trials, cell.blocks, cell.waiting) == (1, 6, 2)


def test_before_there_are_enough_blocks_nothing_is_said() -> None:
    cell = only(runs(*(gate(aa((block,)), slots=4) for block in WILD[:3])))
    assert (cell.trials, cell.sd, cell.detectable_8, cell.revoked) == (0, None, None, "")


@pytest.mark.parametrize(
    ("blocks", "told"), [(QUIET, ""), (WILD, "scatter"), (BIASED, "the same code differs by +1.")]
)
def test_a_cell_that_fails_a_a_over_nights_loses_its_rights(blocks: tuple[float, ...], told: str) -> None:
    cell = only(runs(*(gate(aa((block,)), slots=4) for block in blocks)))
    assert told in cell.revoked
    assert bool(cell.revoked) == bool(told)


def test_it_gets_them_back_by_newer_blocks_that_say_otherwise() -> None:
    nights = [gate(aa((block,)), slots=4) for block in (*WILD, *QUIET)]
    assert only(runs(*nights[:4])).revoked
    assert only(runs(*nights[:7])).revoked  # three of the newest four are quiet, not all
    assert not only(runs(*nights)).revoked


def test_nights_and_whole_runs_tell_of_one_cell() -> None:
    """The newest blocks are judged, wherever they are from."""
    cell = only(runs(gate(aa(WILD)), *(gate(aa((block,)), slots=4) for block in QUIET)))
    assert (cell.trials, cell.blocks, cell.revoked) == (2, 8, "")


def test_injected_losses_are_no_a_a_and_outlive_runs_without_any() -> None:
    heavier = replace(aa(QUIET, "REGRESSED"), comparison="+5 %", estimate=0.051)
    both = (Comparison(AA), Comparison("+5 %", Injection(0.05, 0.05)))
    cell = only(runs(gate(aa(QUIET), heavier, comparisons=both), gate(aa(QUIET))))
    assert (cell.trials, cell.false_regressed) == (2, 0)
    assert [(f.comparison, f.injected, f.verdict) for f in cell.found] == [("+5 %", 0.05, "REGRESSED")]


def test_a_gate_of_equal_sides_is_a_a_and_one_of_others_is_not() -> None:
    equal = gate(aa(QUIET))
    assert same(equal)
    assert not same(replace(equal, candidate=replace(SIDE, artifact="b" * 64)))
    assert not same(replace(equal, candidate=replace(SIDE, session='{"threads": 1}')))


def test_nothing_is_known_of_no_run() -> None:
    assert calibration_info([]) is None
