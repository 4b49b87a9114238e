"""AndroidDevice on a fake phone: real adb protocol, real runner process, fake engine."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.adb.android import AndroidDevice
from device_agents.adb.facts import parse_clusters
from device_agents.adb.transport import AdbTransport
from device_agents.api import Cluster, Device
from device_agents.bundle.model import Bundle
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, DeployFailed, DeviceUnreachable, RunnerDied, UnsupportedDevice
from device_agents.recording import QUESTIONS, parse_vitals
from kvengine.artifact import Artifact
from kvengine.errors import ArtifactError
from kvengine.program import Prefill, Program
from kvengine.recipe import SessionRecipe
from tests.device_agents import fake_runner
from tests.device_agents.adb_fixtures import (
    PROPERTIES,
    REPOSITORY,
    adb,
    add_command,
    commands,
    make_bundle,
    phone,
    set_properties,
)
from tests.device_agents.conftest import make_artifact, wait_for
from tests.device_agents.fake_adb import SERIAL, FakeAdb

__all__ = ["adb", "commands", "phone"]  # fixtures

CONTENTS = {"model.onnx": b"graph" * 10, "weights.bin": b"numbers" * 100}
RECIPE = SessionRecipe(threads=1)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "phone" / "kvfarm"


@pytest.fixture
def device(phone: AdbTransport, bundle: Bundle, root: Path) -> Iterator[AndroidDevice]:
    device = AndroidDevice("pixel8", lambda deadline: phone, lambda abi: bundle, root=str(root))
    yield device
    device.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_artifact(tmp_path / "artifact", CONTENTS)
    return tmp_path / "artifact"


def test_it_is_a_device(device: AndroidDevice) -> None:
    as_device: Device = device
    assert as_device.name == "pixel8"


def test_identity_is_the_phones_and_the_runners(device: AndroidDevice) -> None:
    identity = device.identity(Deadline(60))
    assert (identity.name, identity.kind, identity.simulated) == ("pixel8", "android", "")
    assert identity.model == "Google Pixel 8"
    assert identity.soc == "Google Tensor G3"
    assert (identity.abi, identity.os) == ("x86_64", "Android 15 (API 35)")
    assert identity.build == PROPERTIES["ro.build.fingerprint"]
    assert identity.ram_bytes > 1 << 20
    assert (identity.serial, identity.api_level) == (SERIAL, 35)
    assert identity.abis == ("x86_64", "x86")
    assert sum(len(cluster.cores) for cluster in identity.clusters) == os.cpu_count()
    assert "CPUExecutionProvider" in identity.providers
    assert set(identity.runtime) == {"python", "numpy", "onnxruntime", "kvengine"}


# As AOSP's ThermalManagerService.dumpInternal and BatteryService.dumpInternal print them.
THERMAL_DUMP = """Thermal Status: 0
Cached temperatures:
\tTemperature{mValue=31.2, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
\tTemperature{mValue=31.2, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
\tTemperature{mValue=28.0, mType=2, mName=battery, mStatus=0}"""


@pytest.mark.parametrize(("present", "expected"), [("true", True), ("false", False), ("", None)])
def test_sensors_and_battery_are_named_where_they_are_told(
    device: AndroidDevice, commands: Path, present: str, expected: bool | None
) -> None:
    battery = f"Current Battery Service state:\n  present: {present}\n  level: 80"
    add_command(
        commands,
        "dumpsys",
        f"[ $1 = battery ] && echo '{battery}'; [ $1 != battery ] && echo '{THERMAL_DUMP}'",
    )
    facts = device.facts(Deadline(20))
    assert facts.thermal_sensors == ("VIRTUAL-SKIN", "battery")
    assert facts.battery is expected


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"ro.kvfarm.virtual": "1"}, "virtual phone"),
        ({"ro.boot.qemu": "1"}, "Android emulator"),
        ({"ro.hardware": "ranchu"}, "Android emulator"),
    ],
)
def test_what_is_simulated_says_so(
    device: AndroidDevice, commands: Path, extra: dict[str, str], expected: str
) -> None:
    set_properties(commands, {**PROPERTIES, **extra})
    assert device.facts(Deadline(20)).simulated == expected


def test_a_maker_in_the_models_name_is_not_said_twice(device: AndroidDevice, commands: Path) -> None:
    set_properties(commands, {**PROPERTIES, "ro.product.model": "google Pixel 8"})
    assert device.facts(Deadline(20)).model == "google Pixel 8"


def test_a_phone_of_another_abi_is_unsupported(device: AndroidDevice, commands: Path) -> None:
    set_properties(
        commands, {**PROPERTIES, "ro.product.cpu.abi": "armeabi-v7a", "ro.product.cpu.abilist": "armeabi-v7a"}
    )
    with pytest.raises(UnsupportedDevice, match="a bundle for x86_64 on a device that runs armeabi-v7a"):
        device.identity(Deadline(30))


@pytest.mark.parametrize(
    ("run_sh", "words"),
    [
        ("echo 'run.sh: lib/ld-linux-x86-64.so.2: Permission denied' >&2; exit 126", "Permission denied"),
        ("echo 'bin/python3: Exec format error' >&2; exit 1", "Exec format"),
    ],
)
def test_a_phone_that_executes_nothing_is_unsupported_and_the_reason_is_told(
    phone: AdbTransport, commands: Path, root: Path, tmp_path: Path, run_sh: str, words: str
) -> None:
    add_command(commands, "getenforce", "echo Enforcing")
    bundle = make_bundle(tmp_path / "broken", run_sh)
    device = AndroidDevice("pixel8", lambda deadline: phone, lambda abi: bundle, root=str(root))
    with pytest.raises(UnsupportedDevice, match=rf"(?s)^[^\n]*: SELinux is enforcing; name .*root.*{words}"):
        device.identity(Deadline(30))


@pytest.mark.parametrize("above", ["phone", "."])
def test_a_phone_whose_folder_is_mounted_noexec_is_unsupported_and_that_is_the_reason(
    phone: AdbTransport, commands: Path, tmp_path: Path, above: str
) -> None:
    """Wherever it is mounted, and however the folder is called."""
    add_command(commands, "getenforce", "echo Enforcing")
    (tmp_path / "phone").mkdir()
    (tmp_path / "link").symlink_to("phone")
    mounts = f"dm-5 / f2fs rw 0 0\nfuse {(tmp_path / above).resolve()} fuse rw,noexec 0 0\n"
    add_command(commands, "cat", f'[ "$1" = /proc/mounts ] && printf "{mounts}" || exec /bin/cat "$@"')
    bundle = make_bundle(tmp_path / "broken", "echo 'bin/python3: Permission denied' >&2; exit 126")
    folder = str(tmp_path / "link" / "kvfarm")
    device = AndroidDevice("pixel8", lambda deadline: phone, lambda abi: bundle, root=folder)
    with pytest.raises(UnsupportedDevice, match=r"(?s)it is mounted noexec \(fuse .*Permission denied"):
        device.identity(Deadline(30))


def test_a_python_that_fails_to_start_is_a_dead_runner(
    phone: AdbTransport, root: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "broken", "echo 'No module named encodings' >&2; exit 1")
    device = AndroidDevice("pixel8", lambda deadline: phone, lambda abi: bundle, root=str(root))
    with pytest.raises(RunnerDied, match="No module named encodings"):
        device.identity(Deadline(30))


def test_deploy_brings_a_whole_artifact_once(device: AndroidDevice, folder: Path, root: Path) -> None:
    remote = device.deploy(folder, Deadline(30))
    assert Artifact.open(remote).manifest == Artifact.open(folder).manifest
    assert remote == f"{root}/artifacts/{Artifact.open(folder).id}"
    moved = device.bytes_moved
    assert moved == sum(map(len, CONTENTS.values())) + (folder / "artifact.json").stat().st_size
    assert device.deploy(folder, Deadline(30)) == remote
    assert device.bytes_moved == moved


def test_a_folder_that_is_no_artifact_is_refused(device: AndroidDevice, tmp_path: Path) -> None:
    with pytest.raises(DeployFailed, match=r"sought artifact\.json"):
        device.deploy(tmp_path, Deadline(30))


def test_a_session_runs_in_a_process_on_the_phone(device: AndroidDevice, folder: Path) -> None:
    remote = device.deploy(folder, Deadline(30))
    recipe = SessionRecipe(threads=1, environment={"FAKE_NOTE": "from the recipe"})
    session = device.open_session(remote, recipe, Deadline(30))
    assert session.info.notes == ("from the recipe",)
    assert session.run_program(Program(4, (Prefill((2,)),)))[0].position == 1
    session.close()


def test_the_bundle_is_brought_once(adb: FakeAdb, device: AndroidDevice, folder: Path) -> None:
    remote = device.deploy(folder, Deadline(30))
    device.open_session(remote, RECIPE, Deadline(30)).close()
    moved = device.bytes_moved
    adb.services.clear()
    device.open_session(remote, RECIPE, Deadline(30)).close()
    assert device.bytes_moved == moved
    assert len(adb.services) == 1


def test_an_emptied_phone_gets_everything_again(device: AndroidDevice, folder: Path, root: Path) -> None:
    remote = device.deploy(folder, Deadline(30))
    device.open_session(remote, RECIPE, Deadline(30)).close()
    shutil.rmtree(root)
    with pytest.raises(RunnerDied):
        device.open_session(remote, RECIPE, Deadline(30))
    remote = device.deploy(folder, Deadline(30))
    device.open_session(remote, RECIPE, Deadline(30)).close()


def test_a_runner_that_dies_says_how(device: AndroidDevice, folder: Path) -> None:
    session = device.open_session(device.deploy(folder, Deadline(30)), RECIPE, Deadline(30))
    with pytest.raises(RunnerDied, match=r"(?s)signal 9.*last words of the fake engine"):
        session.run_program(Program(4, (Prefill((fake_runner.DIE,)),)))
    session.close()


def test_a_phone_unplugged_in_the_middle_is_unreachable(
    adb: FakeAdb, device: AndroidDevice, folder: Path, tmp_path: Path
) -> None:
    recipe = SessionRecipe(threads=1, environment={"FAKE_STARTED": str(tmp_path / "started")})
    session = device.open_session(device.deploy(folder, Deadline(30)), recipe, Deadline(30))

    def unplug() -> None:
        wait_for((tmp_path / "started").exists)
        adb.hang_up()

    unplugger = threading.Thread(target=unplug)
    unplugger.start()
    with pytest.raises(DeviceUnreachable, match="broke off"):
        session.run_program(Program(4, (Prefill((fake_runner.HANG,)),)))
    unplugger.join()
    session.close()


def test_an_engines_refusal_comes_back_as_itself(device: AndroidDevice) -> None:
    with pytest.raises(ArtifactError, match="found none"):
        device.open_session(fake_runner.REFUSED_FOLDER, RECIPE, Deadline(30))


def test_an_artifact_damaged_on_the_phone_is_no_refusal_of_the_engine(
    phone: AdbTransport, root: Path, tmp_path: Path, folder: Path
) -> None:
    run_sh = f'export PYTHONPATH={REPOSITORY}\nexec {sys.executable} "$@"\n'
    bundle = make_bundle(tmp_path / "real", run_sh)  # the real runner, which checks what it opens
    device = AndroidDevice("pixel8", lambda deadline: phone, lambda abi: bundle, root=str(root))
    remote = device.deploy(folder, Deadline(30))
    path = Path(remote, "weights.bin")
    stat = path.stat()
    path.chmod(0o755)
    path.write_bytes(b"Numbers" * 100)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DeployFailed, match=r"weights\.bin changed on the device"):
        device.open_session(remote, RECIPE, Deadline(60))
    Artifact.open(device.deploy(folder, Deadline(30)))


# -- vitals --------------------------------------------------------------------------------

BATTERY = """\
Current Battery Service state:
  AC powered: false
  USB powered: true
  Max charging current: 500000
  status: 2
  health: 2
  present: true
  level: 87
  scale: 100
  voltage: 4123
  temperature: 301
  technology: Li-ion
"""
THERMAL = """\
IsStatusOverride: false
Thermal Status: 2
Cached temperatures:
	Temperature{mValue=31.4, mType=3, mName=skin, mStatus=2}
"""
ANSWERS = {
    "battery": BATTERY,
    "thermal": THERMAL,
    "zones": "45100 cpu\n46000 cpu\n-273000 dead\n38 in-degrees\n380 in-tenths\n\n250000 hot\n garbage",
    "clocks": "0/cpufreq 1800000 walt\n1/cpufreq 300000 walt\n10/cpufreq 2400000 performance",
    "memory": "MemAvailable:    2048 kB",
    "load": "1.25 0.5 0.1 2/345 678",
}


def test_vitals_are_read_from_what_android_prints() -> None:
    vitals = parse_vitals(ANSWERS, at=5.0)
    assert (vitals.at, vitals.load_1m, vitals.mem_available_bytes) == (5.0, 1.25, 2048 * 1024)
    assert (vitals.battery_percent, vitals.battery_charging, vitals.thermal_status) == (87.0, True, 2)
    assert vitals.clocks_khz == (1800000, 300000, 2400000)
    assert vitals.governor == "performance+walt"
    assert vitals.temperatures_c == {"cpu": 45.1, "cpu#2": 46.0, "battery": 30.1}


def test_a_battery_that_prints_updates_stopped_is_not_believed() -> None:
    stopped = BATTERY.replace("state:", "state:\n  (UPDATES STOPPED -- use 'reset' to restart)")
    vitals = parse_vitals({**ANSWERS, "battery": stopped}, at=5.0)
    assert (vitals.battery_percent, vitals.battery_charging) == (None, None)
    assert "battery" not in vitals.temperatures_c


@pytest.mark.parametrize(
    ("old", "new", "percent", "charging"),
    [
        ("status: 2", "status: 3", 87.0, False),
        ("status: 2", "status: 1", 87.0, None),
        ("scale: 100", "scale: 200", 43.5, True),
        ("level: 87", "level: -1", None, True),
        ("present: true", "present: false", None, None),
    ],
)
def test_battery_fields(old: str, new: str, percent: float | None, charging: bool | None) -> None:
    vitals = parse_vitals({**ANSWERS, "battery": BATTERY.replace(old, new)}, at=5.0)
    assert (vitals.battery_percent, vitals.battery_charging) == (percent, charging)


def test_what_the_phone_does_not_tell_is_none() -> None:
    vitals = parse_vitals(dict.fromkeys(QUESTIONS, ""), at=5.0)
    assert vitals.battery_percent is None
    assert vitals.thermal_status is None
    assert vitals.clocks_khz == ()
    assert vitals.governor is None
    assert vitals.mem_available_bytes is None
    assert vitals.temperatures_c == {}


def test_vitals_come_over_adb_in_one_command(adb: FakeAdb, device: AndroidDevice, commands: Path) -> None:
    add_command(commands, "dumpsys", f"case $1 in battery) cat <<'E'\n{BATTERY}E\n;; *) echo; esac")
    vitals = device.vitals(Deadline(20))
    assert vitals.battery_percent == 87.0
    assert vitals.mem_available_bytes
    assert len(adb.services) == 1


def test_clusters_are_cores_of_the_same_highest_clock() -> None:
    text = "0 1704000\n1 1704000\n10 2914000\n2 2367000\n3\n"
    assert parse_clusters(text) == (
        Cluster(None, (3,)),
        Cluster(1704000, (0, 1)),
        Cluster(2367000, (2,)),
        Cluster(2914000, (10,)),
    )


def test_a_phone_is_told_to_reboot_and_one_that_will_not_says_why(
    device: AndroidDevice, commands: Path, tmp_path: Path
) -> None:
    add_command(commands, "reboot", f"touch {tmp_path / 'told'}")
    device.reboot(Deadline(10))
    assert (tmp_path / "told").exists()
    add_command(commands, "reboot", "echo not permitted >&2; exit 1")
    with pytest.raises(AdbFailure, match=r"pixel8 does not reboot.*not permitted"):
        device.reboot(Deadline(10))
