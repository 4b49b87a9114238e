"""The logger on a device and its log: real shells on this machine, and logs that are not whole."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError, LeaseError
from device_agents.host import HostDevice
from device_agents.lab_agent import LabAgent
from device_agents.recording import QUESTIONS, Plan, parse_log, parse_vitals
from device_agents.recording.answers import parse_gauge, parse_rails
from device_agents.recording.logger import script
from device_agents.recording.record import MARK
from tests.device_agents.conftest import wait_for
from tests.device_agents.lab_agents import CONTENTS, make_fake, open_session, upload

__all__ = ["CONTENTS"]
QUICK = Plan(max_s=30, period_s=0.1, slow_every=3)
DUMP = """Current Battery Service state:
  AC powered: false
  USB powered: false
  Wireless powered: false
  Max charging current: 0
  Charge counter: 3229200
  status: 3
  health: 2
  present: true
  level: 72
  scale: 100
  voltage: 3912
  temperature: 284
  technology: Li-ion
"""


@pytest.fixture
def host(tmp_path: Path) -> HostDevice:
    return HostDevice("bench", tmp_path / "lab")


def loggers(folder: Path) -> list[int]:
    """Processes that run in the recording's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "cwd").startswith(str(folder)):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "lab" / "recording" / "bench"
    yield folder
    wait_for(lambda: loggers(folder) == [])  # the kernel may need a moment to finish a killed one


# -- the logger ------------------------------------------------------------------------------------


def test_a_recording_tells_of_the_device_and_of_the_runner(host: HostDevice, folder: Path) -> None:
    recording = host.start_recording(QUICK, os.getpid(), Deadline(20))
    wait_for(lambda: (folder / "log").read_text().count(f"{MARK} end") >= 4)
    record = recording.stop(Deadline(20))
    assert len(record.samples) >= 4
    times = [sample.at for sample in record.samples]
    assert times == sorted(set(times))
    runners = [sample.runner for sample in record.samples if sample.runner is not None]
    assert len(runners) == len(record.samples)
    assert runners[0].pss_bytes is not None
    assert runners[0].pss_bytes > 1 << 20
    assert runners[0].cgroup
    assert runners[-1].cpu_s >= runners[0].cpu_s > 0
    assert record.samples[0].vitals.mem_available_bytes
    assert record.samples[0].gauge.voltage_v is None  # a host is not asked for a battery
    assert not folder.exists()


def test_its_clock_is_that_of_the_measurements(host: HostDevice, folder: Path) -> None:
    import time

    recording = host.start_recording(QUICK, None, Deadline(20))
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    record = recording.stop(Deadline(20))
    assert abs(record.samples[0].at - now) < 10


def test_starting_ends_the_recording_that_a_dead_agent_left(host: HostDevice, folder: Path) -> None:
    host.start_recording(QUICK, None, Deadline(20))
    (first,) = {int((folder / "pid").read_text())}
    recording = host.start_recording(QUICK, None, Deadline(20))
    assert int((folder / "pid").read_text()) != first
    wait_for(lambda: not Path(f"/proc/{first}").exists() or first not in loggers(folder))
    assert recording.stop(Deadline(20)).samples


def test_a_logger_nobody_stops_ends_after_its_time(host: HostDevice, folder: Path) -> None:
    host.start_recording(Plan(max_s=1, period_s=0.1), None, Deadline(20))
    wait_for(lambda: loggers(folder) == [])


def test_a_logger_burns_every_core_it_is_told_to_and_stops(host: HostDevice, folder: Path) -> None:
    plan = Plan(max_s=3, period_s=0.2, burn_after_s=1, burn_s=1)
    recording = host.start_recording(plan, None, Deadline(20))
    wait_for(lambda: loggers(folder) == [])
    burning = [sample.burning for sample in recording.stop(Deadline(20)).samples]
    assert burning[0] is False
    assert burning[-1] is False
    assert any(burning)


def test_a_stopped_burn_leaves_no_process(host: HostDevice, folder: Path) -> None:
    plan = Plan(max_s=60, period_s=0.2, burn_after_s=0, burn_s=50)
    recording = host.start_recording(plan, None, Deadline(20))
    wait_for(lambda: len(loggers(folder)) > 1)
    recording.stop(Deadline(20))


def test_a_logger_that_was_killed_has_told_what_it_had(host: HostDevice, folder: Path) -> None:
    recording = host.start_recording(QUICK, None, Deadline(20))
    wait_for(lambda: f"{MARK} end 3" in (folder / "log").read_text())
    os.killpg(int((folder / "pid").read_text()), signal.SIGKILL)
    assert len(recording.stop(Deadline(20)).samples) >= 3


def test_a_recording_stopped_twice_says_so(host: HostDevice, folder: Path) -> None:
    recording = host.start_recording(QUICK, None, Deadline(20))
    recording.stop(Deadline(20))
    with pytest.raises(InfrastructureError, match="sought the log"):
        recording.stop(Deadline(20))


def test_a_log_has_a_most_size(tmp_path: Path) -> None:
    text = script(Plan(max_s=60, period_s=0.01), None, 1, android=False).replace(
        "ulimit -f 16384", "ulimit -f 8"
    )
    assert "ulimit -f 8\n" in text
    (tmp_path / "logger.sh").write_text(text)
    subprocess.run(["sh", "logger.sh"], cwd=tmp_path, timeout=30, check=False)
    assert (tmp_path / "log").stat().st_size <= 8 * 1024  # a block is 512 bytes, or 1024 in bash


@pytest.mark.parametrize("shell", ["dash", "bash"])  # mksh: tests/e2e/test_recording.py
def test_the_script_is_understood_by_every_shell(shell: str) -> None:
    text = script(QUICK, 1, 2, android=True)
    assert subprocess.run([shell, "-n"], input=text, text=True, timeout=10, check=False).returncode == 0


# -- the agent -------------------------------------------------------------------------------------


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[LabAgent]:
    agent = LabAgent(tmp_path / "lab", [DeviceConfig("bench")], make=make_fake)
    yield agent
    agent.shutdown()


def test_the_agent_records_for_the_holder_of_the_lease_only(agent: LabAgent, folder: Path) -> None:
    lease = agent.acquire("bench", "me", 60)
    manifest = upload(agent)
    agent.deploy("bench", lease.token, manifest.to_json())
    session = open_session(agent, "bench", lease.token)
    with pytest.raises(LeaseError):
        agent.start_recording(session, lease.token - 1, QUICK)
    agent.start_recording(session, lease.token, QUICK)
    with pytest.raises(LeaseError):
        agent.stop_recording(session, lease.token - 1)
    samples = agent.stop_recording(session, lease.token).samples
    assert samples[0].runner is not None
    with pytest.raises(InfrastructureError, match="nothing is being recorded"):
        agent.stop_recording(session, lease.token)


def test_a_recording_ends_with_its_lease(agent: LabAgent, folder: Path) -> None:
    lease = agent.acquire("bench", "me", 60)
    manifest = upload(agent)
    agent.deploy("bench", lease.token, manifest.to_json())
    agent.start_recording(open_session(agent, "bench", lease.token), lease.token, QUICK)
    assert loggers(folder)
    agent.release("bench", lease.token)
    assert loggers(folder) == []
    assert not folder.exists()


# -- the log ---------------------------------------------------------------------------------------


def sample(number: int, at: str, end: str | None = None) -> str:
    end = f"{MARK} end {number}\n" if end is None else end
    return (
        f"{MARK} sample {number} {at} 1700000000.5 idle\n{MARK} battery\n{DUMP}{MARK} current\n-312000\n{end}"
    )


def test_a_log_cut_off_in_its_last_sample_is_read_up_to_there() -> None:
    record = parse_log(sample(1, "10.00") + sample(2, "11.01") + sample(3, "12.02", end=""))
    assert [s.at for s in record.samples] == [10.0, 11.01]
    assert record.note == "1 of 3 samples are not whole"
    gauge = record.samples[0].gauge
    assert (gauge.voltage_v, gauge.counter_uah, gauge.current) == (3.912, 3_229_200, -312_000)
    assert (gauge.plugged, gauge.charging, gauge.percent, gauge.celsius) == (False, False, 72.0, 28.4)
    assert record.samples[0].vitals.at == 1700000000.5


@pytest.mark.parametrize("cut", range(0, len(sample(1, "10.00")), 7))
def test_a_cut_anywhere_gives_a_whole_sample_or_none(cut: int) -> None:
    whole = sample(1, "10.00")
    record = parse_log(whole + sample(2, "11.00")[:cut])
    assert record.samples == parse_log(whole).samples


def test_time_that_runs_back_ends_the_reading() -> None:
    record = parse_log(sample(1, "10.00") + sample(2, "9.00") + sample(3, "11.00"))
    assert [s.at for s in record.samples] == [10.0]
    assert "sample 2 is not later" in record.note


@pytest.mark.parametrize("text", ["", "nonsense\n" * 9, f"{MARK}\n{MARK} end 1\n", "\x00\xff" * 50])
def test_nonsense_is_no_sample_and_no_error(text: str) -> None:
    assert parse_log(text).samples == ()
    assert parse_log(text).note == "the device's logger wrote no sample"


# -- what the answers mean -------------------------------------------------------------------------


def vitals(**answers: str) -> dict[str, float]:
    return parse_vitals(dict.fromkeys(QUESTIONS, "") | answers, 0.0).temperatures_c


def test_a_dump_that_broke_off_is_believed_but_for_its_last_line() -> None:
    for end in range(len(DUMP)):
        for tail in ("", "\n*** SERVICE 'battery' DUMP TIMEOUT (10000ms) EXPIRED ***\n"):
            gauge = parse_gauge(DUMP[:end] + tail)
            assert gauge.voltage_v in (None, 3.912)
            assert gauge.counter_uah in (None, 3_229_200)
            assert gauge.percent in (None, 72.0)
            assert gauge.celsius in (None, 28.4)
            assert gauge.charging in (None, False)


@pytest.mark.parametrize(
    ("told", "celsius"),
    [("284", 28.4), ("28", None), ("28,4", None), ("٢٨٤", 28.4), ("-2740", None), ("2840", None)],
)
def test_a_battery_temperature_is_in_tenths_or_not_known(told: str, celsius: float | None) -> None:
    assert parse_gauge(DUMP.replace("284", told)).celsius == celsius


def test_zones_that_count_otherwise_or_are_not_wired_are_left_out() -> None:
    zones = "27 mtktsbattery\n310 pmic\n0 mtktscpu\n125000 mtkts_bts1\n33500 skin\n-273000 x\n33600 skin"
    assert vitals(zones=zones) == {"skin": 33.5, "skin#2": 33.6}


def test_a_current_that_is_javas_unknown_is_none() -> None:
    assert parse_gauge(DUMP, "-2147483648").current is None
    assert parse_gauge(DUMP, "Unknown get option: current_now").current is None
    assert parse_gauge(DUMP, "-312").current == -312


def test_sysfs_is_finer_than_the_dump() -> None:
    gauge = parse_gauge(DUMP, "", "current_now 512\nvoltage_now 3899100\ncharge_counter 3229111")
    assert (gauge.current, gauge.voltage_v, gauge.counter_uah) == (512, 3.8991, 3_229_111)


def test_rails_are_read_by_name() -> None:
    text = (
        "t=473848\nCH0(T=473848)[S10M_VDD_TPU], 3161249\nCH3(T=473848)[S2M_VDD_CPUCL2], 28071872\nCH4(T=4738"
    )
    assert parse_rails(text) == {
        "S10M_VDD_TPU": (473.848, 3_161_249),
        "S2M_VDD_CPUCL2": (473.848, 28_071_872),
    }


def test_only_the_hals_present_temperatures_count() -> None:
    sensor = "\tTemperature{{mValue={}, mType={}, mName={}, mStatus=0}}\n"
    dump = (
        "IsStatusOverride: false\nThermalEventListeners:\nThermal Status: 2\nCached temperatures:\n"
        + sensor.format("60.0", 3, "skin")
        + "HAL Ready: true\nCurrent temperatures from HAL:\n"
        + sensor.format("36.5", 3, "skin")
        + sensor.format("37.5", 3, "skin")
        + sensor.format("6900.0", 7, "soft_ocp_cpu1")
        + sensor.format("36,5", 0, "BIG")
        + sensor.format("-99.9", 2, "nowhere")
        + "Current cooling devices from HAL:\n"
    )
    assert vitals(thermal=dump) == {"skin": 36.5, "skin#2": 37.5}
    assert parse_vitals({"thermal": dump}, 0.0).thermal_status == 2
