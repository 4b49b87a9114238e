"""A whole gate over made-up devices: what it decides, what it keeps, and that a kill costs nothing."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from device_agents.api import Vitals
from device_agents.errors import DeviceUnreachable, InfrastructureError, Unauthorized
from harness.gate.settings import EntrySettings, MetricSettings
from harness.gate.waivers import Waiver
from harness.store import open_store
from kvengine.errors import EngineFailure
from tests.harness.gate.fake_farm import FakeDevice
from tests.harness.gate.gates import FIRST_LOOK, SETTINGS, WEIGHED, Gate, cell, info
from tests.harness.test_store import a_check, a_run


def test_the_same_speed_passes_at_the_first_look(gate: Gate) -> None:
    results = gate.run(FakeDevice("phone"))
    assert (info(results).verdict, info(results).exit_code) == ("PASS", 0)
    assert gate.looks == [1]
    assert len(results.legs) == FIRST_LOOK
    assert results.finished_at is not None


def test_both_sides_run_live_in_abba_or_baab(gate: Gate) -> None:
    results = gate.run(FakeDevice("phone"))
    orders = Counter(block.order for block in info(results).blocks)
    assert set(orders) == {"ABBA", "BAAB"}
    a, b = gate.baseline.artifact.id, gate.candidate.artifact.id
    ran = [artifact for _, artifact in gate.farm.opened]
    wanted = [{"A": a, "B": b}[letter] for block in info(results).blocks for letter in block.order]
    assert ran == wanted


def test_a_slower_candidate_is_regressed(gate: Gate) -> None:
    results = gate.run(FakeDevice("phone", loss=0.06))
    assert (info(results).verdict, info(results).exit_code) == ("REGRESSED", 1)
    assert {c.metric for c in info(results).cells if c.verdict == "REGRESSED"} == {"ttft", "decode"}
    assert cell(results, "decode").estimate == pytest.approx(0.06, abs=0.01)
    assert cell(results, "memory").verdict == "PASS"


def test_a_faster_candidate_passes(gate: Gate) -> None:
    assert info(gate.run(FakeDevice("phone", loss=-0.2))).verdict == "PASS"


def test_more_blocks_are_measured_while_it_is_undecided(gate: Gate) -> None:
    gate.seed = 8
    results = gate.run(FakeDevice("phone", noise=0.1))
    assert (info(results).verdict, info(results).exit_code) == ("INCONCLUSIVE", 3)
    assert gate.looks == [1, 2, 3]
    assert len(cell(results, "decode").blocks) == 16


def test_what_a_look_decided_stands(gate: Gate) -> None:
    """Another device goes on; more noise there must not reopen what was decided here."""
    gate.seed = 8
    results = gate.run(FakeDevice("phone", loss=0.06), FakeDevice("noisy", noise=0.1))
    assert gate.looks == [1, 2, 3]
    decode = cell(results, "decode")
    assert (decode.verdict, decode.looks, len(decode.blocks)) == ("REGRESSED", 1, 4)
    assert cell(results, "decode", "noisy").looks == 3


def test_a_canary_that_drifts_voids_the_block(gate: Gate) -> None:
    results = gate.run(FakeDevice("phone", drift=0.05))
    assert (info(results).verdict, info(results).exit_code) == ("INVALID", 4)
    assert all("canary moved" in block.reasons[0] for block in info(results).blocks)
    assert len(info(results).blocks) == 4
    assert "4 blocks in a row" in cell(results, "decode").reason


def test_a_disturbed_device_gets_time_to_settle_before_the_next_block(gate: Gate) -> None:
    rules = replace(SETTINGS, entry=EntrySettings(wait_s=0.0, wait_total_s=0.2))
    results = gate.run(FakeDevice("phone", drift=0.05), settings=rules)
    assert sum(block.waited_s for block in info(results).blocks) == pytest.approx(0.2)
    assert gate.notes == ["phone is disturbed: the next block starts in 0 s"]


def test_other_tokens_are_regressed_without_any_statistics(gate: Gate) -> None:
    gate.tokens = {gate.candidate.artifact.id: 5}
    results = gate.run(FakeDevice("phone"))
    assert info(results).verdict == "REGRESSED"
    assert cell(results, "tokens").reason == "other tokens for the same prompt"
    assert cell(results, "kv_bytes").reason.startswith("equal in all")


def test_memory_is_weighed_in_a_pass_of_its_own(gate: Gate) -> None:
    """The timed legs' own processes, which weigh something else, decide nothing."""
    results = gate.run(FakeDevice("phone"))
    memory = cell(results, "memory")
    assert (memory.verdict, memory.gating, memory.baseline) == ("PASS", True, 100 << 20)
    assert memory.blocks == (0.0,) * 4
    legs = [leg for leg in results.legs if leg.memory_pass]
    two_pairs = ["baseline", "candidate", "candidate", "baseline"]
    assert [leg.place.arm for leg in legs if leg.place] == two_pairs * 2
    assert all("memory" not in block.data for block in info(results).blocks)


@pytest.mark.parametrize(("heavier", "verdict"), [(0.015, "PASS"), (0.025, "REGRESSED")])
def test_a_heavier_candidate_is_regressed_by_its_memory_alone(
    gate: Gate, heavier: float, verdict: str
) -> None:
    results = gate.run(FakeDevice("phone", heavier=heavier))
    assert cell(results, "memory").verdict == info(results).verdict == verdict
    assert cell(results, "memory").estimate == pytest.approx(heavier, abs=1e-6)
    assert cell(results, "decode").verdict == "PASS"


def test_more_pairs_are_weighed_while_memory_is_undecided(gate: Gate) -> None:
    """And no more once it is decided, though the blocks go on."""
    gate.seed = 8
    results = gate.run(FakeDevice("phone", noise=0.1, weight_noise=0.08))
    assert gate.looks == [1, 2, 3]
    assert len(cell(results, "memory").blocks) == 16
    results = gate.run(FakeDevice("phone", noise=0.1))
    assert (gate.looks[-1], len(cell(results, "memory").blocks)) == (3, 4)


def test_a_killed_weighing_goes_on_and_repeats_nothing(gate: Gate) -> None:
    def kill(number: int) -> None:
        if number == 4:
            raise Killed

    with pytest.raises(Killed):
        gate.run(FakeDevice("phone", before_weighing=kill))
    results = gate.run(FakeDevice("phone"))
    assert gate.farm.devices["phone"].weighings == WEIGHED - 3
    assert len(results.legs) == FIRST_LOOK


def test_a_weighing_that_is_lost_is_told_and_another_pair_is_weighed(gate: Gate) -> None:
    def lost(number: int) -> None:
        if number in (1, 2):  # the first try and the second
            raise InfrastructureError("a hiccup")

    results = gate.run(FakeDevice("phone", before_weighing=lost))
    assert (cell(results, "memory").verdict, cell(results, "memory").void) == ("PASS", 1)
    assert results.infrastructure == ("phone: weighing 1 of p8+n4: a hiccup",)


class Killed(BaseException):
    """As sudden as a SIGKILL, for this process."""


@pytest.mark.parametrize("at", [0, 1, 7, 15])
def test_a_killed_gate_goes_on_and_repeats_nothing(gate: Gate, at: int) -> None:
    def kill(number: int) -> None:
        if number == at:
            raise Killed

    with pytest.raises(Killed):
        gate.run(FakeDevice("phone", before_leg=kill))
    results = gate.run(FakeDevice("phone"))
    assert len(gate.farm.opened) == 16 - at
    places = [leg.place for leg in results.legs]
    assert len(places) == len(set(places)) == FIRST_LOOK
    assert info(results).verdict == "PASS"
    with open_store(gate.path) as store:
        assert len(store.runs()) == 1
    if at:
        assert any("going on with run" in note for note in gate.notes)


def test_an_interruption_ends_the_other_lanes_with_their_leg(gate: Gate) -> None:
    """Real phones are measured side by side; the one that goes on must not keep the user waiting."""

    def kill(number: int) -> None:
        if number == 2:
            raise Killed

    with pytest.raises(Killed):
        gate.run(
            FakeDevice("phone", before_leg=kill), FakeDevice("other", before_leg=lambda n: time.sleep(0.1))
        )
    assert gate.farm.devices["other"].legs < 16
    results = gate.run(FakeDevice("phone"), FakeDevice("other"))
    assert len(results.legs) == 2 * FIRST_LOOK
    assert info(results).verdict == "PASS"


def test_all_waiting_is_bounded_over_all_looks(gate: Gate) -> None:
    hot = Vitals(at=1.0, thermal_status=1)
    rules = replace(SETTINGS, entry=EntrySettings(wait_s=0.3, wait_total_s=0.5))
    results = gate.run(FakeDevice("phone", vitals=lambda: hot), settings=rules)
    waited = sum(leg.place.waited_s for leg in results.legs if leg.place)
    assert waited == pytest.approx(0.5, abs=0.4)
    assert info(results).verdict == "INVALID"


def test_a_finished_gate_is_not_gone_on_with(gate: Gate) -> None:
    first, second = (gate.run(FakeDevice("phone")) for _ in range(2))
    assert first.run_id != second.run_id
    assert len(second.legs) == FIRST_LOOK


def test_a_lost_device_is_invalid_and_the_other_goes_on(gate: Gate) -> None:
    def lost(number: int) -> None:
        raise DeviceUnreachable("the cable fell out")

    results = gate.run(FakeDevice("phone", before_leg=lost), FakeDevice("other"))
    assert (info(results).verdict, info(results).exit_code) == ("INVALID", 4)
    assert cell(results, "decode", "other").verdict == "PASS"
    assert "the cable fell out" in cell(results, "decode").reason
    assert any("the cable fell out" in error for error in results.infrastructure)


def test_a_device_that_does_not_answer_is_told(gate: Gate) -> None:
    results = gate.run(FakeDevice("phone", silent=True))
    assert info(results).exit_code == 4
    assert cell(results, "decode").reason.endswith("it does not say who it is")
    assert results.infrastructure == ("phone: it does not say who it is",)


def test_one_failure_of_infrastructure_costs_nothing(gate: Gate) -> None:
    failures = iter([InfrastructureError("a hiccup")])

    def hiccup(number: int) -> None:
        if number == 5 and (error := next(failures, None)):
            raise error

    results = gate.run(FakeDevice("phone", before_leg=hiccup))
    assert info(results).verdict == "PASS"
    assert any("a hiccup" in note for note in gate.notes)
    (flaky,) = [leg for leg in results.legs if leg.retries]
    assert "a hiccup" in flaky.retries[0]


def test_a_device_that_was_set_aside_says_so_in_the_results(gate: Gate) -> None:
    def lost(number: int) -> None:
        raise Unauthorized("the cable fell out")

    found = {device.name: device for device in gate.run(FakeDevice("phone", before_leg=lost)).devices}
    assert "the cable fell out" in found["phone"].quarantined


def test_bandwidth_is_measured_once_a_device_after_its_first_block(gate: Gate) -> None:
    legs = gate.run(FakeDevice("phone"), FakeDevice("other")).legs
    told = [(leg.device, leg.place.block, leg.place.position) for leg in legs if leg.bandwidth and leg.place]
    assert sorted(told) == [("other", 0, 3), ("phone", 0, 3)]
    assert all(leg.reads is not None for leg in legs if leg.place and leg.place.arm != "canary")


def test_what_the_suite_said_of_the_candidate_is_told_and_decides_nothing(gate: Gate) -> None:
    recipe = gate.candidate.side.recipe
    passed = replace(a_check(), device="phone", recipe=recipe, worst_error=2e-5, tolerance=1e-4)
    failed = replace(passed, check="test_p9", title="Rewinding is exact", outcome="failed")
    with open_store(gate.path) as store:
        store.begin_run(replace(a_run("suite"), model=gate.candidate.model, gate=None))
        store.add_check("suite", passed)
        store.add_check("suite", failed)
    found = info(gate.run(FakeDevice("phone"), FakeDevice("other")))
    assert found.verdict == "PASS"
    phone, other = found.checked
    assert (phone.run_id, phone.passed, phone.total, phone.failed) == ("suite", 1, 2, ("Rewinding is exact",))
    assert phone.worst_share == pytest.approx(0.2)
    assert (other.device, other.run_id, other.total) == ("other", "", 0)


def test_an_engine_that_refuses_is_invalid(gate: Gate) -> None:
    def refuse(number: int) -> None:
        raise EngineFailure("no such kernel")

    results = gate.run(FakeDevice("phone", before_leg=refuse))
    assert info(results).exit_code == 4
    assert "the engine refused: no such kernel" in cell(results, "decode").reason


def test_a_device_that_is_not_fit_is_flagged_and_decides_nothing(gate: Gate) -> None:
    hot = Vitals(at=1.0, temperatures_c={"battery": 41.0})
    results = gate.run(FakeDevice("phone", vitals=lambda: hot))
    assert info(results).verdict == "INVALID"
    legs = [x for x in results.legs if x.place and x.place.arm != "canary" and not x.memory_pass]
    assert {leg.validity for leg in legs} == {"NOISY"}
    assert all("the battery has 41.0 °C" in leg.reasons[-1] for leg in legs)


def test_a_waiver_lets_a_known_loss_through(gate: Gate) -> None:
    day = (datetime.now(UTC) + timedelta(days=10)).date().isoformat()
    waiver = Waiver("phone/*/ttft", 0.10, "mara", "longer prefill", "#1", day)
    other = replace(waiver, cell="phone/*/decode")
    idle = replace(waiver, cell="elsewhere/*")
    results = gate.run(FakeDevice("phone", loss=0.06), waivers=(waiver, other, idle))
    assert (info(results).verdict, info(results).exit_code) == ("PASS", 0)
    assert cell(results, "ttft").verdict == "REGRESSED"
    assert cell(results, "ttft").waived == "longer prefill"
    assert [w.state for w in info(results).waivers] == ["used", "used", "unused"]


def test_an_expired_waiver_fails_even_a_gate_that_passes(gate: Gate) -> None:
    waiver = Waiver("phone/*/ttft", 0.10, "mara", "longer prefill", "#1", "2026-01-01")
    results = gate.run(FakeDevice("phone"), waivers=(waiver,))
    assert (info(results).verdict, info(results).exit_code) == ("PASS", 1)


def test_without_a_gating_cell_nothing_is_green(gate: Gate) -> None:
    metrics = ("ttft", "decode", "memory", "tokens", "kv_bytes")
    rules = replace(SETTINGS, metrics={name: MetricSettings(gates=False) for name in metrics})
    assert info(gate.run(FakeDevice("phone"), settings=rules)).exit_code == 4
