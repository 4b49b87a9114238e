"""What calibrations, nights of A/A and many units of one model change in what a gate decides."""

from __future__ import annotations

import pytest

from device_agents.errors import DeviceUnreachable
from reports.gate_results import AA, GATE, Comparison, GateCell, Injection
from reports.results import RunResults
from tests.harness.gate.fake_farm import FakeDevice
from tests.harness.gate.gates import Gate, cell, info

# -- calibration --------------------------------------------------------------------------------


def test_a_calibration_tells_what_the_gate_sees(gate: Gate) -> None:
    results = gate.calibrate(FakeDevice("phone"), injected=(0.03, 0.05, 0.10))
    assert (info(results).verdict, info(results).exit_code) == ("PASS", 0)
    found = info(results).calibration
    assert found is not None
    assert (found.trials, found.false_regressed) == (3, 0)  # ttft, decode, memory
    assert found.false_high == pytest.approx(1 - 0.025 ** (1 / 3))
    decode = next(c for c in found.cells if c.metric == "decode")
    assert [(f.injected, f.verdict) for f in decode.found][1:] == [(0.05, "REGRESSED"), (0.10, "REGRESSED")]
    assert decode.found[1].estimate == pytest.approx(0.05, abs=0.01)
    memory = next(c for c in found.cells if c.metric == "memory")
    assert [f.verdict for f in memory.found] == ["REGRESSED"] * 3
    assert memory.found[0].estimate == pytest.approx(0.03, abs=1e-4)


def test_calibrations_add_up(gate: Gate) -> None:
    for _ in range(3):
        results = gate.calibrate(FakeDevice("phone"), injected=())
    found = info(results).calibration
    assert found is not None
    assert (found.trials, len(found.runs)) == (9, 3)


def test_a_cell_that_fails_a_a_loses_its_gating_rights(gate: Gate) -> None:
    noisy = FakeDevice("phone", noise=0.08)  # block SD over every margin
    calibration = info(gate.calibrate(noisy)).calibration
    assert calibration is not None
    revoked = {c.metric: c.revoked for c in calibration.cells}
    assert "scatter" in revoked["decode"]
    assert revoked["memory"] == ""
    results = gate.run(FakeDevice("phone"))
    assert cell(results, "decode").advisory.startswith("failed A/A: blocks of the same code scatter")
    assert cell(results, "memory").gating
    assert info(results).verdict == "PASS"


def test_a_cell_gets_its_rights_back_when_it_passes_again(gate: Gate) -> None:
    gate.calibrate(FakeDevice("phone", noise=0.08))
    gate.calibrate(FakeDevice("phone"))
    assert cell(gate.run(FakeDevice("phone")), "decode").gating


def test_a_device_nobody_calibrated_still_gates(gate: Gate) -> None:
    gate.calibrate(FakeDevice("phone", noise=0.08))
    assert cell(gate.run(FakeDevice("other")), "decode", "other").gating


def test_a_a_of_several_nights_is_one_verdict(gate: Gate) -> None:
    for number in range(4):
        gate.seed = number
        results = gate.night(FakeDevice("phone"))
        decode = cell(results, "decode", comparison=AA)
        assert len(decode.blocks) == 1
        if number < 3:
            told = f"{number + 1} of 4 A/A blocks so far, 1 of them in this run"
            assert (decode.verdict, decode.reason) == ("INCONCLUSIVE", told)
    assert decode.verdict == "PASS"
    found = info(gate.run(FakeDevice("phone"))).calibration
    assert found is not None
    assert {c.metric: (c.trials, c.blocks) for c in found.cells} == {
        "ttft": (1, 4),
        "decode": (1, 4),
        "memory": (1, 4),
    }


def test_noise_of_several_nights_takes_the_right_to_gate(gate: Gate) -> None:
    for number in range(4):
        gate.seed = number
        gate.night(FakeDevice("phone", noise=0.08))
    gate.seed = 7
    results = gate.run(FakeDevice("phone"))
    assert cell(results, "decode").advisory.startswith("failed A/A: blocks of the same code scatter")
    assert cell(results, "memory").gating


def test_a_gate_of_equal_sides_counts_as_a_a(gate: Gate) -> None:
    results = gate.run(FakeDevice("phone"), candidate=gate.baseline)
    found = info(results).calibration
    assert found is not None
    assert (found.trials, found.runs) == (3, (results.run_id,))


def test_a_drill_is_told_and_its_loss_is_found(gate: Gate) -> None:
    slower = (Comparison(GATE, Injection(0.05)),)
    results = gate.run(
        FakeDevice("phone"), candidate=gate.baseline, comparisons=slower, drill="5 % slower on purpose"
    )
    assert (info(results).verdict, info(results).drill) == ("REGRESSED", "5 % slower on purpose")
    assert results.provenance["DRILL"] == "5 % slower on purpose", "by which the store knows it"
    found = info(results).calibration
    assert found is not None
    assert found.trials == 0
    assert cell(results, "memory").verdict == "PASS"


# -- many units of one model --------------------------------------------------------------------


def units(*losses: float) -> list[FakeDevice]:
    return [FakeDevice(f"u{number}", loss=loss) for number, loss in enumerate(losses)]


def group_cell(results: RunResults, metric: str = "decode") -> GateCell:
    (found,) = [c for c in info(results).cells if c.units and c.metric == metric]
    return found


def test_six_units_of_one_model_are_judged_together(gate: Gate) -> None:
    results = gate.run(*units(*[0.0] * 6), looks=(4,))
    found = group_cell(results)
    assert (found.verdict, found.units, len(found.blocks)) == ("PASS", 6, 6)
    assert not cell(results, "decode", "u0").gating
    assert cell(results, "tokens", "u0").gating
    assert info(results).exit_code == 0


def test_a_loss_on_all_units_is_regressed(gate: Gate) -> None:
    results = gate.run(*units(0.05, 0.055, 0.06, 0.05, 0.055, 0.06), looks=(4,))
    assert group_cell(results).verdict == "REGRESSED"
    assert info(results).exit_code == 1


def test_a_loss_on_one_unit_is_device_specific(gate: Gate) -> None:
    results = gate.run(*units(0.06, -0.01, -0.012, -0.008, -0.01, -0.011), looks=(4,))
    found = group_cell(results)
    assert found.verdict == "INCONCLUSIVE"
    assert info(results).exit_code == 3


def test_a_unit_that_is_lost_is_missed_though_six_others_pass(gate: Gate) -> None:
    def lost(number: int) -> None:
        raise DeviceUnreachable("the cable fell out")

    devices = units(*[0.0] * 7)
    devices[6].before_leg = lost
    results = gate.run(*devices, looks=(4,))
    assert (group_cell(results).verdict, group_cell(results).reason) == ("INVALID", "not measured on u6")
    assert info(results).exit_code == 4


def test_five_units_are_judged_one_by_one(gate: Gate) -> None:
    results = gate.run(*units(*[0.0] * 5), looks=(4,))
    assert not [c for c in info(results).cells if c.units]
    assert cell(results, "decode", "u0").gating
