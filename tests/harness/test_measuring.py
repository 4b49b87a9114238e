"""When a measurement may be believed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from device_agents.api import Vitals
from device_agents.recording.record import Record
from harness.measuring import (
    LOOK_S,
    Shape,
    busy_cores,
    judge,
    lengths,
    relative_spread,
    shapes,
    vitals_info,
    workload_for,
)
from harness.sustained import has_settled, sustain
from kvengine.errors import InvalidRequest
from kvengine.program import Measurement, Sample, Workload
from kvengine.spec import LayerSpec, ModelSpec, RopeSpec

CALM = Vitals(at=1.0, load_1m=0.5)
SPEC = ModelSpec("x", 50, 8, 8, 1, 100, 1.0, 1e-6, True, (LayerSpec(None, 0, 1, 8),), (RopeSpec(1e4),))


def measurement(*itl_ms: float) -> Measurement:
    """One repeat for each median inter-token latency."""
    samples = tuple(Sample(10.0, (itl, itl, itl), (1, 2, 3, 4)) for itl in itl_ms)
    return Measurement(samples, 1.0, 1, 1, {}, threads=2)


def test_steady_repeats_on_a_calm_device_are_valid() -> None:
    assert judge(measurement(10.0, 10.4, 9.9), CALM, CALM) == ("VALID", ())


def test_a_median_that_moves_is_noisy() -> None:
    verdict, (reason,) = judge(measurement(10.0, 12.0), CALM, CALM)
    assert verdict == "NOISY"
    assert "18%" in reason


def test_a_host_that_others_use_is_noisy() -> None:
    verdict, (reason,) = judge(measurement(10.0, 10.0), CALM, CALM, busy=0.4)
    assert (verdict, reason) == ("NOISY", "before the leg other processes use 0.40 cores, over 0.25")
    assert judge(measurement(10.0, 10.0), CALM, CALM, busy=0.25) == ("VALID", ())


def test_a_load_average_is_information_and_no_reason() -> None:
    """It is what we did ourselves, minutes ago."""
    assert judge(measurement(10.0, 10.0), replace(CALM, load_1m=13.0), CALM) == ("VALID", ())


def test_busy_cores_are_cpu_time_over_half_a_second() -> None:
    first, second = Vitals(at=10.0, busy_s=100.0), Vitals(at=10.5, busy_s=100.3)
    paused: list[float] = []
    assert busy_cores(first, lambda: second, paused.append) == pytest.approx(0.6)
    assert paused == [LOOK_S]
    assert busy_cores(Vitals(at=10.0), lambda: second, paused.append) is None
    assert paused == [LOOK_S], "where nothing can be read nobody waits"


@pytest.mark.parametrize("hot_before", [True, False])
def test_a_throttling_device_is_invalid(hot_before: bool) -> None:
    hot = replace(CALM, thermal_status=2)
    verdict, reasons = judge(measurement(10.0), *((hot, CALM) if hot_before else (CALM, hot)))
    assert verdict == "INVALID"
    assert "thermal status was 2" in reasons[0]


def test_repeats_that_disagree_are_invalid() -> None:
    one, other = measurement(10.0), Measurement((Sample(1, (), (9,)),), 1.0, 1, 1, {}, 2)
    both = replace(one, samples=one.samples + other.samples)
    assert judge(both, CALM, CALM)[0] == "INVALID"


def test_no_sample_is_invalid() -> None:
    assert judge(measurement(), CALM, CALM) == ("INVALID", ("no sample came back",))


def test_spread_is_over_the_median() -> None:
    assert relative_spread([9.0, 10.0, 12.0]) == pytest.approx(0.3)
    assert relative_spread([9.0]) == 0.0


def test_one_interrupted_repeat_in_five_is_no_spread() -> None:
    """Two are: then the leg was slow for a good part of its time."""
    assert relative_spread([10.0, 10.0, 15.0, 10.2, 10.0]) == pytest.approx(0.02)
    assert relative_spread([10.0, 15.0, 15.0, 10.2, 10.0]) == pytest.approx(5 / 10.2)
    assert relative_spread([10.0, 10.0, 10.0, 15.0]) == pytest.approx(0.5)


def test_a_workload_is_the_same_for_everybody_and_fits_the_model() -> None:
    workload = workload_for(SPEC, prompt=500, new_tokens=10, repeats=2, seed=3)
    assert workload == workload_for(SPEC, prompt=500, new_tokens=10, repeats=2, seed=3)
    assert workload != workload_for(SPEC, prompt=500, new_tokens=10, repeats=2, seed=4)
    assert len(workload.prompt) == 90
    assert set(workload.prompt) <= set(range(50))


def test_a_context_comes_before_the_same_prompt() -> None:
    workload = workload_for(SPEC, prompt=5, new_tokens=10, repeats=2, seed=3, depth=30)
    assert (len(workload.context), len(workload.prompt)) == (30, 5)
    with pytest.raises(InvalidRequest, match="the model holds 100"):
        workload_for(SPEC, prompt=5, new_tokens=10, repeats=2, seed=3, depth=90)


def test_shapes_are_every_combination_and_one_sustained_run() -> None:
    found = shapes((32, 128), (64,), (0, 1024), sustained_s=60)
    assert [shape.label for shape in found] == [
        "prompt 32 + 64 new",
        "prompt 32 + 64 new at depth 1,024",
        "prompt 128 + 64 new",
        "prompt 128 + 64 new at depth 1,024",
        "sustained, prompt 32 + 64 new",
    ]
    assert len({shape.key for shape in found}) == 5
    assert shapes((8,), (4,), (0,)) == (Shape(8, 4),)


def test_lengths_of_an_option() -> None:
    assert lengths("32, 128,32") == (32, 128)
    assert lengths("0,5", least=0) == (0, 5)
    for bad in ("", "0", "-1", "a", "1.5", "²"):
        with pytest.raises(ValueError, match="sought whole numbers"):
            lengths(bad)


class Cooling:
    """A session whose device slows down: tokens/s of one generation after the other, 3 s each."""

    def __init__(self, *rates: float) -> None:
        self.rates = list(rates)
        self.now = 100.0

    def run_workload(self, workload: Workload) -> Measurement:
        assert (workload.warmup, workload.repeats) == (0, 1)
        rate = self.rates.pop(0) if len(self.rates) > 1 else self.rates[0]
        began, self.now = self.now, self.now + 3.0
        sample = Sample(5.0, (1000 / rate,) * 3, (1, 2, 3, 4))
        return Measurement((sample,), 7.0, 1, 1, {}, 1, began, self.now)


def test_a_sustained_run_ends_where_the_speed_has_settled() -> None:
    slowing = [40 - n for n in range(20)]
    run = sustain(Cooling(*slowing, 20.0), Workload((1,), 4), 600, lambda *_: None)
    assert run.settled
    assert 25 <= len(run.points) < 60
    info = run.info(Record())
    assert info.first == pytest.approx(37)
    assert info.last == pytest.approx(20)
    assert info.seconds[0] == pytest.approx(3)
    assert len(run.measurement.samples) == len(run.points)


def test_a_sustained_run_is_bounded_and_says_so() -> None:
    falling = [1000 * 0.9**n for n in range(200)]
    run = sustain(Cooling(*falling), Workload((1,), 4), 120, lambda *_: None)
    assert not run.settled
    assert len(run.points) == 40
    verdict, reasons = judge(run.measurement, CALM, CALM, sustained=run.info(Record()))
    assert verdict == "NOISY"
    assert reasons == ("the speed had not settled when time was up",)


def test_few_points_have_not_settled() -> None:
    assert not has_settled([10.0] * 19)
    assert has_settled([10.0] * 20)
    assert not has_settled([10.0] * 15 + [9.0] * 5)


def test_a_sustained_run_needs_a_second_token_and_a_clock() -> None:
    with pytest.raises(InvalidRequest, match="2 new tokens"):
        sustain(Cooling(1.0), Workload((1,), 1), 60, lambda *_: None)


def test_vitals_reach_the_report_unchanged() -> None:
    vitals = Vitals(at=1.5, load_1m=0.1, clocks_khz=(1, 2), temperatures_c={"cpu": 40.5}, battery_percent=80)
    shown = vitals_info(vitals)
    assert (shown.at, shown.load_1m, shown.clocks_khz) == (1.5, 0.1, (1, 2))
    assert (shown.temperatures_c, shown.battery_percent) == ({"cpu": 40.5}, 80)
