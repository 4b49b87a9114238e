"""When a measurement may be believed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from device_agents.api import Vitals
from harness.measuring import judge, relative_spread, vitals_info, workload_for
from kvengine.program import Measurement, Sample
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


def test_a_busy_device_is_noisy() -> None:
    verdict, (reason,) = judge(measurement(10.0, 10.0), replace(CALM, load_1m=3.5), CALM)
    assert verdict == "NOISY"
    assert "3.5" in reason


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


def test_a_workload_is_the_same_for_everybody_and_fits_the_model() -> None:
    workload = workload_for(SPEC, prompt=500, new_tokens=10, repeats=2, seed=3)
    assert workload == workload_for(SPEC, prompt=500, new_tokens=10, repeats=2, seed=3)
    assert workload != workload_for(SPEC, prompt=500, new_tokens=10, repeats=2, seed=4)
    assert len(workload.prompt) == 90
    assert set(workload.prompt) <= set(range(50))


def test_vitals_reach_the_report_unchanged() -> None:
    vitals = Vitals(at=1.5, load_1m=0.1, clocks_khz=(1, 2), temperatures_c={"cpu": 40.5}, battery_percent=80)
    shown = vitals_info(vitals)
    assert (shown.at, shown.load_1m, shown.clocks_khz) == (1.5, 0.1, (1, 2))
    assert (shown.temperatures_c, shown.battery_percent) == ({"cpu": 40.5}, 80)
