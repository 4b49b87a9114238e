"""The real logger on a virtual phone, over real adb: mksh, toybox, dumpsys from a profile, a real runner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.adb.android import AndroidDevice
from device_agents.adb.connection import AdbServer
from device_agents.adb.store import ROOT
from device_agents.adb.transport import AdbTransport
from device_agents.bundle import build
from device_agents.deadline import Deadline
from device_agents.energy import Calibration, Window, measure
from device_agents.recording import Plan
from device_agents.virtual import VirtualPhone, load_profile
from device_agents.virtual.adb import PrivateAdbServer
from device_agents.virtual.rootfs import native_abi
from harness.during import during_info
from harness.recipes import parse_recipe
from kvengine.program import Workload
from kvengine.recipe import SessionRecipe
from tests.conftest import ExportTiny
from tests.device_agents.conftest import wait_for
from tests.e2e.test_android_device import BUNDLES, start

PROFILE = "pixel-6-rails"


@pytest.fixture(scope="module")
def transport(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdbTransport]:
    phone = VirtualPhone("logged", load_profile(PROFILE), native_abi(), tmp_path_factory.mktemp("phones"))
    start(phone)
    try:
        with PrivateAdbServer() as server:
            yield AdbTransport(AdbServer(server.port, start=False), phone.address)
    finally:
        phone.stop()


@pytest.fixture(scope="module")
def device(transport: AdbTransport) -> AndroidDevice:
    bundle = build(native_abi(), BUNDLES)
    return AndroidDevice("logged", lambda deadline: transport, lambda abi: bundle)


def loggers(transport: AdbTransport) -> list[str]:
    ps = transport.checked("ps -A -o PID,ARGS", Deadline(20))
    return [line for line in ps.splitlines() if "logger.sh" in line and "ps -A" not in line]


def test_a_leg_is_recorded_on_the_phone_and_its_energy_refused_for_being_short(
    device: AndroidDevice, transport: AdbTransport, export_tiny: ExportTiny
) -> None:
    artifact = export_tiny(parse_recipe("hybrid").export)
    remote = device.deploy(artifact.folder, Deadline(60))
    session = device.open_session(remote, SessionRecipe(threads=1), Deadline(60))
    try:
        plan = Plan(max_s=60, period_s=0.25, slow_every=3)
        recording = device.start_recording(plan, session.pid, Deadline(30))
        found = session.run_workload(Workload((1, 2, 3, 4), 60, 40))
        log = f"{ROOT}/recording/log"
        wait_for(lambda: int(transport.checked(f"grep -c ' end ' {log} || true", Deadline(20))) >= 8)
        record = recording.stop(Deadline(30))
    finally:
        session.close()

    assert len(record.samples) >= 8
    assert found.ended_s > found.began_s > record.samples[0].at - 1
    assert record.samples[-1].at > found.ended_s - 1
    during = during_info(record)
    assert during.thermal_status == 0
    assert during.peak_c is not None
    assert 15 < during.peak_c < 100
    assert [text.partition(":")[0] for text in during.clocks] == ["cores 0-3", "cores 4-5", "cores 6-7"]
    assert during.governor == "sched_pixel"
    assert during.pss_bytes is not None
    assert during.pss_bytes > 10 << 20
    assert during.cgroup
    assert during.minor_faults is not None
    gauge = record.samples[0].gauge
    assert gauge.plugged is True
    assert gauge.current is not None
    assert gauge.voltage_v is not None
    assert 3.5 < gauge.voltage_v < 4.5
    assert set(record.samples[0].rails) == {rail.name for rail in load_profile(PROFILE).rails}
    energies = [sum(energy for _, energy in s.rails.values()) for s in record.samples]
    assert energies == sorted(energies)
    assert energies[-1] > energies[0]

    calibration = Calibration("Pixel 6", "", "rails", 0.0, 1.0, 0.5, 8.0)
    energy = measure(record, calibration, Window(found.began_s, found.ended_s, 2400))
    assert energy.rung == "unsupported"
    assert energy.reason
    assert loggers(transport) == []
    assert transport.checked(f"ls {ROOT}", Deadline(20)).split().count("recording") == 0


def test_the_next_recording_ends_one_that_was_left_behind(
    device: AndroidDevice, transport: AdbTransport, tmp_path: Path
) -> None:
    plan = Plan(max_s=60, period_s=0.25)
    device.start_recording(plan, None, Deadline(30))
    recording = device.start_recording(plan, None, Deadline(30))
    assert len(loggers(transport)) == 1
    assert recording.stop(Deadline(30)).samples
    assert loggers(transport) == []


def test_the_loggers_own_burn_draws_power_from_every_core(
    device: AndroidDevice, transport: AdbTransport
) -> None:
    plan = Plan(max_s=6, period_s=0.25, burn_after_s=2, burn_s=3)
    recording = device.start_recording(plan, None, Deadline(30))
    wait_for(lambda: loggers(transport) == [])
    samples = recording.stop(Deadline(30)).samples
    burning = [s for s in samples if s.burning]
    resting = [s for s in samples if not s.burning and s.at < burning[0].at]

    def power(part: list[object]) -> float:
        first, last = part[0], part[-1]
        joules = [sum(energy for _, energy in s.rails.values()) / 1e6 for s in (first, last)]  # type: ignore[attr-defined]
        return float((joules[1] - joules[0]) / (last.at - first.at))  # type: ignore[attr-defined]

    # 0.5 W and more with the machine to itself; other tests take their share of the cores.
    assert power(list(burning)) > power(list(resting)) + 0.2
