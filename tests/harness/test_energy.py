"""A leg's energy: calibration, rest, work and rest on a simulated phone, in simulated time."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.api import DeviceIdentity, Vitals
from device_agents.energy import CALIBRATION_PLAN, MIN_WINDOW_S
from device_agents.errors import DeviceUnreachable
from device_agents.recording.answers import Gauge
from device_agents.recording.record import Plan, Record, RunnerUse, Sample
from device_agents.virtual.profile import load_profile
from device_agents.virtual.simulated import SimulatedPhone
from harness import energy as module
from harness.during import during_info
from harness.energy import energy_of
from kvengine.program import Measurement, Workload
from kvengine.program import Sample as Repeat
from reports.results import EnergyInfo

WORKLOAD = Workload((1, 2, 3), 50, 3)
CORES, REPEAT_S = 2.0, 7.0


class Session:
    """A runner on a simulated phone; ``rest`` is what the harness does while it waits."""

    def __init__(self, profile: str, *, dies: bool = False) -> None:
        self.profile = load_profile(profile)
        self.phone = SimulatedPhone(self.profile, 5)
        self.dies = dies
        self.recording: Plan | None = None
        self.plans: list[Plan] = []

    def start_recording(self, plan: Plan) -> None:
        assert self.recording is None
        self.phone.take_record()
        self.recording = plan
        self.plans.append(plan)

    def stop_recording(self) -> Record:
        assert self.recording is not None
        self.recording = None
        return self.phone.take_record()

    def run_workload(self, workload: Workload) -> Measurement:
        if self.dies:
            raise DeviceUnreachable("unplugged")
        began = self.phone.now
        self.phone.record(REPEAT_S * workload.repeats, lambda _: CORES)
        repeats = (Repeat(1.0, (1.0,), (1,)),) * workload.repeats
        return Measurement(repeats, 1.0, 1, 1, {}, 2, began, self.phone.now)

    def rest(self, seconds: float) -> None:
        plan = self.recording
        if plan is not None and plan.burn_after_s is not None:
            self.phone.record(plan.burn_after_s, lambda _: 0.0)
            self.phone.record(plan.burn_s, lambda _: float(self.profile.cores), burning=True)
            self.phone.record(seconds - plan.burn_after_s - plan.burn_s, lambda _: 0.0)
        else:
            self.phone.record(seconds, lambda _: 0.0)


def run(
    session: Session, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str = "android"
) -> tuple[EnergyInfo, list[str]]:
    steps: list[str] = []
    monkeypatch.setattr(module, "_rest", session.rest)
    who = DeviceIdentity(
        "p",
        kind,
        session.profile.model,
        "",
        "",
        "",
        session.profile.fingerprint,
        8,
        1,
        (),
        {},
        "virtual phone",
    )
    return energy_of(session, who, WORKLOAD, cache, lambda step, *_: steps.append(step)), steps


def test_a_leg_gives_joules_for_each_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session("oneplus-7t")
    found, steps = run(session, tmp_path, monkeypatch)
    assert found.rung == "gauge", found.reason
    true = CORES * session.profile.battery.core_w * REPEAT_S / WORKLOAD.new_tokens
    assert found.net_j_per_token == pytest.approx(true, rel=0.03)
    assert found.window_s >= MIN_WINDOW_S
    assert found.tokens == round(found.window_s / REPEAT_S) * WORKLOAD.new_tokens
    assert steps[0] == "energy: calibrating"
    assert session.recording is None


def test_a_model_is_calibrated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = run(Session("oneplus-7t"), tmp_path, monkeypatch)
    session = Session("oneplus-7t")
    second, steps = run(session, tmp_path, monkeypatch)
    assert "energy: calibrating" not in steps
    assert CALIBRATION_PLAN not in session.plans
    assert first.rung == second.rung == "gauge"
    other = Session("pixel-8")
    run(other, tmp_path, monkeypatch)
    assert CALIBRATION_PLAN in other.plans


def test_a_damaged_calibration_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Session("oneplus-7t"), tmp_path, monkeypatch)
    (kept,) = tmp_path.glob("*.json")
    kept.write_text('{"model": 3}')
    session = Session("oneplus-7t")
    found, _ = run(session, tmp_path, monkeypatch)
    assert CALIBRATION_PLAN in session.plans
    assert found.rung == "gauge"


@pytest.mark.parametrize(
    ("profile", "reason"), [("pixel-6a-charging", "plugged in"), ("honor-stopped", "UPDATES STOPPED")]
)
def test_what_a_look_shows_is_not_waited_for(
    profile: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(profile)
    found, steps = run(session, tmp_path, monkeypatch)
    assert reason in found.reason
    assert found.net_j_per_token is None
    assert steps == []
    assert list(tmp_path.iterdir()) == []


def test_a_host_has_no_battery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run(Session("pixel-8"), tmp_path, monkeypatch, kind="host")
    assert found == EnergyInfo("unsupported", "p is a host: no battery that feeds it alone is known here")


def test_a_device_that_goes_away_is_the_labs_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session("oneplus-7t", dies=True)
    with pytest.raises(DeviceUnreachable):
        run(session, tmp_path, monkeypatch)
    assert session.recording is None


# -- vitals during a leg ---------------------------------------------------------------------------


def sample(at: float, *, soc: float, clock: int, status: int | None = 0) -> Sample:
    vitals = Vitals(
        at,
        clocks_khz=(300, 300, clock, clock),
        governor="walt",
        temperatures_c={"zone0": 90.0, "soc": soc},
        thermal_status=status,
    )
    use = RunnerUse(
        100 + int(at), 3, at, pss_bytes=int(at) << 20, swap_bytes=0, cgroup="0::/top", cpuset="/top"
    )
    return Sample(at, False, vitals, Gauge(percent=80 - at), runner=use)


def test_a_record_is_told_by_its_extremes_and_frozen_sensors_are_not_peaks() -> None:
    samples = [
        sample(float(i), soc=40.0 + i, clock=1_000_000 * (1 + i % 2), status=i // 10) for i in range(12)
    ]
    during = during_info(Record(tuple(samples)))
    assert (during.samples, during.seconds) == (12, 11.0)
    assert (during.hottest, during.peak_c) == ("soc", 51.0)
    assert during.thermal_status == 1
    assert during.clocks == ("cores 0-1: 0 MHz", "cores 2-3: 1,000–2,000 MHz")
    assert during.battery_percent == (80.0, 69.0)
    assert (during.pss_bytes, during.minor_faults, during.major_faults) == (11 << 20, 11, 0)
    assert (during.cpuset, during.cgroup) == ("/top", "0::/top")


def test_only_the_leg_itself_counts() -> None:
    samples = [sample(float(i), soc=40.0 + i, clock=1) for i in range(40)]
    during = during_info(Record(tuple(samples)), 10.0, 20.0)
    assert (during.samples, during.peak_c) == (13, 61.0)
    assert during_info(Record(tuple(samples)), 100.0, 200.0).note == "no sample fell into the leg"
    assert during_info(Record((), "the phone died")).note == "the phone died"
