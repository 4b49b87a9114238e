"""AndroidDevice over real adb and adbd on a virtual phone, with the real bundle and engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from device_agents.adb.android import AndroidDevice
from device_agents.adb.connection import AdbServer
from device_agents.adb.devices import make_android
from device_agents.adb.transport import AdbTransport
from device_agents.bundle import Bundle, build
from device_agents.config import DeviceConfig, DeviceSettings
from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, DeviceUnreachable, InfrastructureError, RunnerDied
from device_agents.lab_agent import LabAgent
from device_agents.virtual import VirtualPhone, VirtualPhoneUnavailable, load_profile
from device_agents.virtual.adb import PrivateAdbServer
from device_agents.virtual.rootfs import native_abi
from harness.recipes import parse_recipe
from harness.synth import synth
from kvengine.engine import LocalEngine
from kvengine.program import Decode, Generate, Prefill, Program
from kvengine.recipe import SessionRecipe
from tests.conftest import ExportTiny

REPOSITORY = Path(__file__).parent.parent.parent
BUNDLES = REPOSITORY / ".kvfarm" / "bundles"  # where `kvfarm bundle` keeps them
RECIPE = SessionRecipe(threads=1)
PROGRAM = Program(64, (Prefill(tuple(range(1, 30)), chunk=7), Decode((3, 4)), Generate(5, 5)))
SUITE_S = 240


def start(phone: VirtualPhone) -> None:
    try:
        phone.start(Deadline(300))
    except VirtualPhoneUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualPhone]:
    phone = VirtualPhone("one", load_profile(), native_abi(), tmp_path_factory.mktemp("phones"))
    start(phone)
    yield phone
    phone.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[PrivateAdbServer]:
    with PrivateAdbServer() as server:
        yield server


@pytest.fixture(scope="module")
def transport(phone: VirtualPhone, server: PrivateAdbServer) -> AdbTransport:
    # Not connected by hand: the transport does that.
    return AdbTransport(AdbServer(server.port, start=False), phone.address)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return build(native_abi(), BUNDLES)


@pytest.fixture(scope="module")
def device(transport: AdbTransport, bundle: Bundle) -> AndroidDevice:
    return AndroidDevice("one", lambda deadline: transport, lambda abi: bundle)


def processes(transport: AdbTransport) -> str:
    """Of the phone, with their arguments."""
    return transport.checked("ps -A -o PID,ARGS", Deadline(20))


# -- the shell of Android ------------------------------------------------------------------


def test_the_shell_is_androids_and_not_root(transport: AdbTransport) -> None:
    result = transport.run(["sh", "-c", "id -u; echo $KSH_VERSION; echo err >&2; exit 7"], Deadline(20))
    assert result.stdout.startswith(b"2000\n@(#)MIRBSD KSH")
    assert (result.stderr, result.returncode) == (b"err\n", 7)


def test_words_arrive_as_they_are(transport: AdbTransport) -> None:
    awkward = ["a b", "$HOME", "it's", 'quo"te', "new\nline", ";", ""]
    found = transport.run(["printf", "<%s>", *awkward], Deadline(20)).stdout.decode()
    assert found == "".join(f"<{word}>" for word in awkward)


def test_much_goes_through_a_stream_both_ways(transport: AdbTransport) -> None:
    data = os.urandom(24 << 20)
    stream = transport.open_stream(["cat"], {})
    for part in range(0, len(data), 1 << 20):
        stream.write(data[part : part + (1 << 20)], Deadline(30))
        assert stream.read_exactly(1 << 20, Deadline(30)) == data[part : part + (1 << 20)]
    stream.close()


def test_close_kills_what_is_deaf_with_its_children(transport: AdbTransport) -> None:
    script = "trap '' TERM HUP; sleep 4321 & sleep 4321 & echo; while :; do sleep 4321; done"
    stream = transport.open_stream(["sh", "-c", script], {})
    stream.read_exactly(1, Deadline(20))
    assert processes(transport).count("sleep 4321") >= 3
    stream.close()
    assert "sleep 4321" not in processes(transport)


def test_a_late_command_is_ended_on_the_phone(transport: AdbTransport) -> None:
    with pytest.raises(DeadlineExceeded):
        transport.shell("exec sleep 4322", Deadline(1))
    limit = Deadline(10)
    while "sleep 4322" in processes(transport):
        limit.check("the end of the late command")


def test_files_travel_whole(transport: AdbTransport, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(os.urandom(3_000_000))
    transport.push(tmp_path / "source", "/data/local/tmp/a folder/it's", Deadline(20), mode=0o750)
    transport.pull("/data/local/tmp/a folder/it's", tmp_path / "back", Deadline(20))
    assert (tmp_path / "back").read_bytes() == (tmp_path / "source").read_bytes()
    listed = transport.checked("ls -l '/data/local/tmp/a folder'", Deadline(20))
    assert "-rwxrwxrwx" in listed  # adbd gives everybody what the owner may do
    with pytest.raises(InfrastructureError, match=r"(?i)read-only|permission denied"):
        transport.push(tmp_path / "source", "/system/bin/evil", Deadline(20))


def test_a_lost_adbd_is_an_error_and_then_forgotten(phone: VirtualPhone, transport: AdbTransport) -> None:
    stream = transport.open_stream(["sleep", "4323"], {})
    phone.kill_adbd()
    with pytest.raises(DeviceUnreachable, match="broke off"):
        stream.read_exactly(1, Deadline(20))
    stream.close()
    assert transport.shell("echo back", Deadline(20)).stdout == b"back\n"
    assert "sleep 4323" not in processes(transport)


def test_a_frozen_link_ends_at_the_deadline_and_then_works(
    phone: VirtualPhone, transport: AdbTransport
) -> None:
    phone.relay.freeze(2.0)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        transport.shell("true", Deadline(1))
    assert time.monotonic() - began < 1.5
    assert transport.shell("true", Deadline(20)).returncode == 0


# -- the device ----------------------------------------------------------------------------


def test_identity_is_the_profiles_and_says_simulated(device: AndroidDevice) -> None:
    identity = device.identity(Deadline(300))
    profile = load_profile()
    assert (identity.kind, identity.simulated) == ("android", "virtual phone")
    assert identity.model == f"{profile.manufacturer} {profile.model}"
    assert identity.build == profile.fingerprint
    assert identity.os == f"Android {profile.android} (API {profile.api_level})"
    assert identity.abi == native_abi()
    assert "CPUExecutionProvider" in identity.providers
    assert identity.runtime["onnxruntime"]
    facts = device.facts(Deadline(20))
    assert sum(len(cluster.cores) for cluster in facts.clusters) == profile.cores
    assert {cluster.max_khz for cluster in facts.clusters} == {c.max_khz for c in profile.clusters}


def test_the_phone_answers_as_this_machine_does(device: AndroidDevice, export_tiny: ExportTiny) -> None:
    artifact = export_tiny(parse_recipe("hybrid").export)
    remote = device.deploy(artifact.folder, Deadline(60))
    session = device.open_session(remote, RECIPE, Deadline(60))
    engine = LocalEngine.open(artifact.folder, RECIPE)
    found, here = session.run_program(PROGRAM), engine.run_program(PROGRAM)
    session.close()
    engine.close()
    assert [o.position for o in found] == [o.position for o in here]
    assert found[2].tokens == here[2].tokens
    for theirs, ours in zip(found, here, strict=True):
        np.testing.assert_allclose(theirs.logits, ours.logits, rtol=1e-4, atol=1e-4)


def test_a_second_deploy_moves_nothing_and_is_quick(
    device: AndroidDevice, transport: AdbTransport, bundle: Bundle, export_tiny: ExportTiny
) -> None:
    artifact = export_tiny(parse_recipe("hybrid").export)
    device.open_session(device.deploy(artifact.folder, Deadline(60)), RECIPE, Deadline(60)).close()
    again = AndroidDevice("again", lambda deadline: transport, lambda abi: bundle)  # remembers nothing
    began = time.monotonic()
    again._deploy_bundle(Deadline(60))
    again.deploy(artifact.folder, Deadline(60))
    assert time.monotonic() - began < 1.0
    assert again.bytes_moved == 0


# As a user may write it: Python with its own libraries, and ours kept on PYTHONPATH.
OWN_RUN_SH = """B=$(cd "${0%/*}" && pwd)
export PYTHONHOME="$B" PYTHONPATH="$PYTHONPATH:$B/site" HOME="$B"
exec "$B"/lib/ld-linux-* --library-path "$B/lib" "$B/bin/python3" -S "$@"
"""


OWN_ONNXRUNTIME = """import marshal, os
exec(marshal.loads(open(os.path.join(os.path.dirname(__file__), "real.pyc"), "rb").read()[16:]))
found = get_available_providers()
get_available_providers = lambda: ["XnnpackExecutionProvider", *found]
"""


def test_a_users_own_runtime_runs_the_engine_and_what_it_offers_is_probed(
    phone: VirtualPhone, server: PrivateAdbServer, bundle: Bundle, export_tiny: ExportTiny, tmp_path: Path
) -> None:
    runtime = tmp_path / "runtime"
    shutil.copytree(bundle.folder, runtime, ignore=shutil.ignore_patterns("code", "bundle.json"))
    (runtime / "run.sh").write_text(OWN_RUN_SH)
    onnxruntime = runtime / "site" / "onnxruntime"
    (onnxruntime / "__init__.pyc").rename(onnxruntime / "real.pyc")
    (onnxruntime / "__init__.py").write_text(OWN_ONNXRUNTIME)
    artifact = export_tiny(parse_recipe("hybrid").export)
    options = {"serial": phone.address, "adb_port": str(server.port), "runtime": str(runtime)}
    config = DeviceConfig("own", "android", options={**options, "root": "/data/local/tmp/own"})
    with closing(make_android(config, tmp_path / "lab")) as device:
        found = device.identity(Deadline(120)).providers
        assert found[0] == "XnnpackExecutionProvider"
        assert "CPUExecutionProvider" in found
        with closing(
            device.open_session(device.deploy(artifact.folder, Deadline(60)), RECIPE, Deadline(60))
        ) as session:
            told = session.run_program(PROGRAM)
    with closing(LocalEngine.open(artifact.folder, RECIPE)) as engine:
        assert told[2].tokens == engine.run_program(PROGRAM)[2].tokens


def test_a_users_own_runtime_that_lacks_onnxruntime_says_so(
    phone: VirtualPhone, server: PrivateAdbServer, bundle: Bundle, tmp_path: Path
) -> None:
    runtime = tmp_path / "runtime"
    shutil.copytree(bundle.folder, runtime, ignore=shutil.ignore_patterns("code", "onnxruntime"))
    (runtime / "run.sh").write_text(OWN_RUN_SH)
    options = {"serial": phone.address, "adb_port": str(server.port), "runtime": str(runtime)}
    config = DeviceConfig("own", "android", options={**options, "root": "/data/local/tmp/own"})
    with (
        closing(make_android(config, tmp_path / "lab")) as device,
        pytest.raises(RunnerDied, match="No module named 'onnxruntime'"),
    ):
        device.identity(Deadline(120))


def test_no_file_of_the_telemetry_appears(device: AndroidDevice, transport: AdbTransport) -> None:
    device.identity(Deadline(60))
    found = transport.checked(
        "find / -name '*nnxruntime.db' -o -name deviceid -o -name .ses 2>/dev/null; exit 0", Deadline(30)
    )
    assert found.strip() == ""


def test_a_runner_that_is_stopped_is_ended(
    device: AndroidDevice, transport: AdbTransport, export_tiny: ExportTiny
) -> None:
    artifact = export_tiny(parse_recipe("hybrid").export)
    session = device.open_session(device.deploy(artifact.folder, Deadline(60)), RECIPE, Deadline(60))
    pids = [line.split()[0] for line in processes(transport).splitlines() if "device_agents.runner" in line]
    transport.checked(f"kill -STOP {pids[0]}", Deadline(20))
    session.close()
    assert "device_agents.runner" not in processes(transport)


def test_a_runner_that_is_killed_says_so(
    device: AndroidDevice, transport: AdbTransport, export_tiny: ExportTiny
) -> None:
    artifact = export_tiny(parse_recipe("hybrid").export)
    session = device.open_session(device.deploy(artifact.folder, Deadline(60)), RECIPE, Deadline(60))
    pids = [line.split()[0] for line in processes(transport).splitlines() if "device_agents.runner" in line]
    transport.checked(f"kill -KILL {pids[0]}", Deadline(20))
    with pytest.raises(RunnerDied, match="signal 9"):
        session.run_program(PROGRAM)
    session.close()


def test_vitals_are_the_profiles(device: AndroidDevice) -> None:
    vitals = device.vitals(Deadline(20))
    battery = load_profile().battery
    assert vitals.battery_percent == pytest.approx(battery.level_percent, abs=2)
    assert vitals.battery_charging is False
    assert vitals.thermal_status == 0
    assert vitals.mem_available_bytes
    assert vitals.governor
    assert 15 < vitals.temperatures_c["battery"] < 60


def test_a_battery_whose_updates_are_stopped_is_not_believed(
    server: PrivateAdbServer, bundle: Bundle, tmp_path: Path
) -> None:
    phone = VirtualPhone("stopped", load_profile("honor-stopped"), native_abi(), tmp_path)
    start(phone)
    try:
        transport = AdbTransport(AdbServer(server.port, start=False), phone.address)
        device = AndroidDevice("stopped", lambda deadline: transport, lambda abi: bundle)
        vitals = device.vitals(Deadline(30))
        assert (vitals.battery_percent, vitals.battery_charging) == (None, None)
    finally:
        phone.stop()


def test_the_agent_stops_the_phones_that_it_started(tmp_path: Path) -> None:
    config = DeviceConfig("virtual-1", "android", options={"virtual": "true"})
    (tmp_path / "bundles").symlink_to(BUNDLES)
    agent = LabAgent(tmp_path / "lab", [config])
    try:
        (status,) = agent.status()
        if "allows no virtual phones" in status.error and not os.environ.get("CI"):
            pytest.skip(status.error)
        assert status.identity is not None, status.error
        assert status.identity.simulated == "virtual phone"
    finally:
        agent.shutdown()
    assert _left(tmp_path) == []
    assert list((tmp_path / "lab" / "phones").iterdir()) == []


def test_a_killed_adb_server_of_a_virtual_phone_is_started_again(tmp_path: Path, phone: VirtualPhone) -> None:
    (tmp_path / "bundles").symlink_to(BUNDLES)
    config = DeviceConfig("virtual-1", "android", options={"virtual": "true"})
    device = make_android(config, tmp_path / "lab")
    try:
        device.facts(Deadline(300))
        before = device.vitals(Deadline(30))
        servers = [p for p in psutil.Process().children(recursive=True) if p.name() == "adb"]
        mine = max(servers, key=lambda process: process.create_time())
        mine.kill()
        mine.wait(10)
        after = device.vitals(Deadline(30))
        assert after.at > before.at
        assert after.battery_percent == before.battery_percent
    finally:
        device.close()
    assert not mine.is_running()


# -- the whole way -------------------------------------------------------------------------


@pytest.mark.usefixtures("phone", "bundle")  # to skip, and not to wait for downloads inside
def test_the_suite_passes_on_a_virtual_phone_and_the_report_says_simulated(tmp_path: Path) -> None:
    (tmp_path / ".kvfarm").mkdir()
    (tmp_path / ".kvfarm" / "bundles").symlink_to(BUNDLES)
    model = synth("tiny-gemma3", tmp_path / "tiny-gemma3")
    command = [sys.executable, "-m", "pytest", "--devices=virtual:1", f"--model={model}", "--recipes=hybrid"]
    command += ["--examples=3", "--report=report", "--prompt=8", "--new-tokens=4", "--repeats=2"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=SUITE_S,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "19/19 checks passed; 1/1 measurements" in result.stdout
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    (device,) = results["devices"]
    assert (device["name"], device["kind"], device["simulated"]) == ("virtual-1", "android", "virtual phone")
    page = (tmp_path / "report" / "index.html").read_text()
    assert re.search(r'virtual-1</span>\s*<span class="tag simulated"', page)
    assert _left(tmp_path) == []


@pytest.mark.usefixtures("phone", "bundle")
def test_a_killed_run_leaves_no_phone_no_adb_server_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / ".kvfarm").mkdir()
    (tmp_path / ".kvfarm" / "bundles").symlink_to(BUNDLES)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    options = ["--devices=virtual:1", "--recipes=static", "--examples=10000", "-k", "p09"]
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", f"--model={synth('tiny-gemma3', tmp_path / 'model')}", *options],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            family = _at_work_on_a_phone(process)
        finally:
            process.kill()
    # Ray's own agents take a minute to see that their raylet is gone.
    ours = [each for each, line in family.items() if not re.match("ray::(Dashboard|RuntimeEnv)Agent", line)]
    _, alive = psutil.wait_procs(ours, 20)
    assert alive == []
    assert list((tmp_path / ".kvfarm" / "lab" / "phones").iterdir()) == []
    assert list(temporary.glob("kvfarm-adb-*")) == []


def _at_work_on_a_phone(process: subprocess.Popen[bytes]) -> dict[psutil.Process, str]:
    """All that descends from the run, with its command line, once a runner works on its phone."""
    deadline, pause = Deadline(SUITE_S), threading.Event()
    while True:
        family = {}
        for each in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                family[each] = " ".join(each.cmdline())
        if all(any(part in line for line in family.values()) for part in ("--one-device", "agents.runner")):
            return family
        assert process.poll() is None, "the run ended before its phone worked"
        deadline.check("a runner on the virtual phone")
        pause.wait(0.1)


def _left(folder: Path) -> list[list[str]]:
    """Processes that have to do with ``folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if str(folder) in " ".join(line):
            found.append(line)
    return found


# Claims a phone with settings, says so, and then waits to be killed.
CLAIMS = """import sys, threading
from pathlib import Path
from device_agents.adb.devices import make_android
from device_agents.config import DeviceConfig, DeviceSettings
from device_agents.deadline import Deadline
options = {"serial": sys.argv[1], "adb_port": sys.argv[2]}
config = DeviceConfig("set", "android", options=options, settings=DeviceSettings(True, True, True, 60))
make_android(config, Path(sys.argv[3])).claim(Deadline(60))
print("claimed", flush=True)
threading.Event().wait(60)
"""


def test_settings_of_a_user_who_got_sigkill_are_put_back_at_the_next_claim(
    phone: VirtualPhone, server: PrivateAdbServer, transport: AdbTransport, tmp_path: Path
) -> None:
    state = "for space in global system secure; do settings list $space; done; "
    state += "cat /sys/devices/system/cpu/cpufreq/policy*/scaling_max_freq; ls /data/local/tmp/kvfarm"
    transport.checked("mkdir -p /data/local/tmp/kvfarm", Deadline(20))
    before = transport.checked(state, Deadline(20))
    arguments = [sys.executable, "-c", CLAIMS, phone.address, str(server.port), str(tmp_path)]
    with subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE) as user:
        try:
            assert user.stdout is not None
            assert user.stdout.readline() == b"claimed\n"
        finally:
            user.kill()
    changed = transport.checked(state, Deadline(20)).splitlines()
    expected = {"screen_brightness=60", "airplane_mode_on=1", "stay_on_while_plugged_in=15", "1836000"}
    assert expected <= set(changed)
    config = DeviceConfig("next", "android", options={"serial": phone.address, "adb_port": str(server.port)})
    assert make_android(config, tmp_path).claim(Deadline(60)) == {}
    assert transport.checked(state, Deadline(20)) == before


def test_settings_are_on_while_leased_and_put_back_by_whoever_claims_the_phone_next(tmp_path: Path) -> None:
    wanted = DeviceSettings(fixed_performance=True, stay_on=True, airplane=True, brightness=60)
    config = DeviceConfig("set", "android", options={"virtual": "true"}, settings=wanted)
    with closing(make_android(config, tmp_path / "lab")) as device:
        said = device.claim(Deadline(300))
        assert said["fixed_performance"] == "on, highest clocks 1704/2367/2914 to 1548/1836/2049 MHz"
        assert {name: said[name] for name in ("stay_on", "airplane", "brightness")} == {
            "stay_on": "15",
            "airplane": "1",
            "brightness": "60",
        }
        device.claim(Deadline(30))  # the last user was killed: its values are not the phone's own
        device.release(Deadline(30))
        facts = "settings get system screen_brightness; cmd connectivity airplane-mode"
        transport = device._reach(Deadline(10))
        assert transport.checked(facts, Deadline(10)).split() == ["102", "disabled"]
        assert "2914000" in transport.checked(
            "cat /sys/devices/system/cpu/cpufreq/policy*/scaling_max_freq", Deadline(10)
        )
