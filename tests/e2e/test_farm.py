"""The farm for real: Ray, a lab agent, a runner process and the engine, on this host."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError, LeaseError, NoSuchDevice, RunnerDied
from harness.device_session import DeviceSession
from harness.farm import Farm
from harness.inventory import DEFAULT, DeviceEntry, Inventory, LabEntry
from harness.leasing import Terms
from harness.recipes import parse_recipe
from harness.synth import synth
from kvengine.artifact import Artifact
from kvengine.engine import LocalEngine
from kvengine.errors import InvalidRequest, ProviderUnavailable
from kvengine.export import export
from kvengine.program import Decode, Generate, Prefill, Program, Reset, Workload
from kvengine.recipe import SessionRecipe

RECIPE = SessionRecipe(threads=1)
TOKENS = tuple(range(1, 30))
PROGRAM = Program(
    64, (Prefill(TOKENS, chunk=7), Decode((3, 4)), Generate(5, 10), Reset(), Prefill((9,) * 65))
)
# Some tenths of a second on this model: enough to be in the middle of it.
LONG = Program(1000, (Prefill((7,) * 1000, chunk=1), Reset()) * 50)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = synth("tiny-gemma3", folder / "checkpoint")
    return export(checkpoint, folder / "artifact", parse_recipe("hybrid").export)


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """Two devices, both this host."""
    two = Inventory({"host": DeviceEntry(), "other": DeviceEntry(threads=2)})
    with Farm(two, ("host", "other"), root=tmp_path_factory.mktemp("lab")) as opened:
        yield opened


@pytest.fixture
def session(farm: Farm, artifact: Artifact) -> Iterator[DeviceSession]:
    with farm.open("host", artifact, RECIPE) as opened:
        yield opened


def runners() -> set[int]:
    """Runner processes under this process."""
    found = set()
    for pid in descendants(os.getpid()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"device_agents.runner" in words:
            found.add(pid)
    return found


def descendants(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def test_a_program_on_the_device_equals_the_engine_in_this_process(
    session: DeviceSession, artifact: Artifact
) -> None:
    sought = LocalEngine.open(artifact.folder, RECIPE).run_program(PROGRAM)
    found = session.run_program(PROGRAM)
    assert len(found) == len(sought) == 5
    for ours, theirs in zip(found, sought, strict=True):
        assert (ours.position, ours.tokens, ours.error) == (theirs.position, theirs.tokens, theirs.error)
        np.testing.assert_array_equal(ours.logits, theirs.logits)
    assert found[0].logits.shape == (29, artifact.manifest.spec.vocab_size)
    assert found[4].error is not None
    assert found[4].error.type == "ContextOverflow"


def test_a_session_says_what_it_opened(session: DeviceSession, artifact: Artifact) -> None:
    assert session.info.artifact_id == artifact.id
    assert session.info.session.threads == 1
    assert session.info.notes == ()  # Ray would have it at nice 15
    assert not session.closed


def test_a_workload_is_measured_in_the_runner_process(session: DeviceSession) -> None:
    measured = session.run_workload(Workload(TOKENS, 5, repeats=2))
    assert [len(sample.itl_ms) for sample in measured.samples] == [4, 4]
    assert measured.threads == 1


def test_logits_are_our_own_memory(session: DeviceSession) -> None:
    (observation,) = session.run_program(Program(64, (Prefill(TOKENS),)))
    observation.logits[0, 0] = 0  # Ray lends its own memory read-only, and has little of it


def test_the_inventorys_threads_fill_in_for_the_recipe(farm: Farm, artifact: Artifact) -> None:
    with farm.open("other", artifact, SessionRecipe()) as session:
        assert session.info.session.threads == 2


def test_devices_say_who_they_are_and_how_they_are(farm: Farm) -> None:
    assert [status.name for status in farm.status()] == ["host", "other"]
    identity = farm.identity("host")
    assert identity.cores == os.cpu_count()
    assert not identity.simulated
    assert farm.vitals("host").at > 0


def test_an_artifact_travels_once(farm: Farm, artifact: Artifact) -> None:
    sent: list[int] = []
    farm.open("host", artifact, RECIPE).close()
    farm.open("host", artifact, RECIPE, lambda stage, done, total: sent.append(done)).close()
    assert sent == []


def test_several_sessions_on_one_device_and_on_two_devices_at_once(farm: Farm, artifact: Artifact) -> None:
    sessions = [farm.open(name, artifact, RECIPE) for name in ("host", "host", "other")]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda s: s.run_program(PROGRAM), sessions))
    for session in sessions:
        session.close()
    assert len({observations[2].tokens for observations in found}) == 1


def test_closing_a_session_ends_its_runner(farm: Farm, artifact: Artifact) -> None:
    before = runners()
    session = farm.open("host", artifact, RECIPE)
    assert len(runners() - before) == 1
    session.close()
    session.close()
    assert runners() <= before
    assert session.closed
    with pytest.raises(InfrastructureError, match="this session is closed"):
        session.run_program(PROGRAM)


def test_what_the_engine_refuses_arrives_as_itself(farm: Farm, artifact: Artifact) -> None:
    with pytest.raises(ProviderUnavailable, match="CUDAExecutionProvider"):
        farm.open("host", artifact, SessionRecipe(provider="cuda"))
    with farm.open("host", artifact, RECIPE) as session:
        with pytest.raises(InvalidRequest):
            session.run_workload(Workload(TOKENS, 0))
        assert session.run_program(PROGRAM)  # and the session goes on


def test_an_unknown_device_is_refused_by_name(farm: Farm, artifact: Artifact) -> None:
    with pytest.raises(NoSuchDevice, match="'pixel8' in this farm; it has host, other"):
        farm.open("pixel8", artifact, RECIPE)


def test_a_runner_killed_during_a_program_is_an_infrastructure_error_and_the_farm_goes_on(
    farm: Farm, artifact: Artifact
) -> None:
    before = runners()
    broken = farm.open("host", artifact, RECIPE)
    (runner,) = runners() - before
    with farm.open("other", artifact, RECIPE) as bystander, ThreadPoolExecutor(1) as pool:
        future = pool.submit(broken.run_program, LONG)
        os.kill(runner, signal.SIGKILL)
        with pytest.raises(RunnerDied):
            future.result(60)
        assert broken.closed
        assert bystander.run_program(PROGRAM)
    with farm.open("host", artifact, RECIPE) as again:
        assert again.run_program(PROGRAM)


def test_a_lab_agent_that_dies_is_an_infrastructure_error_and_is_started_again(
    farm: Farm, artifact: Artifact
) -> None:
    broken = farm.open("host", artifact, RECIPE)
    orphans = runners()
    for process in psutil.Process().children(recursive=True):
        if "ray::LabActor" in " ".join(process.cmdline()):
            process.kill()  # ray.kill would be another death: Ray then knows of it by itself
    with pytest.raises(InfrastructureError, match=r"agent of lab host local .* died"):
        broken.run_program(PROGRAM)
    wait_until(lambda: not (orphans & runners()), "runners whose agent died end by themselves")
    with farm.open("host", artifact, RECIPE) as again:
        assert again.run_program(PROGRAM)


def wait_until(true: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline, pause = Deadline(seconds), threading.Event()
    while not true():
        deadline.check(what)
        pause.wait(0.05)


CLIENT = """
import sys
from harness.farm import Farm
from harness.inventory import DeviceEntry, Inventory
from harness.leasing import Terms
from kvengine.artifact import Artifact
from kvengine.recipe import SessionRecipe
two = Inventory({"host": DeviceEntry(), "other": DeviceEntry(threads=2)})
with Farm(two, ("host", "other"), sys.argv[1], terms=Terms(wait_s=0.5)) as farm:
    for device in ("host", "other"):
        try:
            farm.open(device, Artifact.open(sys.argv[2]), SessionRecipe(threads=1)).close()
            sys.stdout.write(f"{device}: opened\\n")
        except Exception as error:
            sys.stdout.write(f"{device}: {type(error).__name__}\\n")
"""


def test_another_client_of_the_cluster_cannot_take_a_leased_device(
    farm: Farm, artifact: Artifact, session: DeviceSession
) -> None:
    farm._release(farm._devices["other"])
    address = ray.get_runtime_context().gcs_address
    client = subprocess.run(
        [sys.executable, "-c", CLIENT, address, str(artifact.folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert client.stdout.splitlines() == ["host: LeaseNotGranted", "other: opened"], client.stderr
    assert session.run_program(PROGRAM)  # and we were not disturbed


def test_a_lease_lives_as_long_as_its_heartbeat(artifact: Artifact, farm: Farm) -> None:
    session = farm.open("host", artifact, RECIPE)
    device = farm._devices["host"]
    # A renewal for a moment only, as if the heartbeat had stopped and the time had passed.
    device.lab.call("renew", 10.0, "host", farm._lease(device), 0.01)
    wait_until(
        lambda: "host" not in {lease.device for lease in device.lab.call("leases", 10.0)}, "the lease expires"
    )
    with pytest.raises(LeaseError):
        session.run_program(PROGRAM)
    with pytest.raises(LeaseError):
        farm.open("host", artifact, RECIPE)  # which tells the farm; what is tried again finds the device
    terms = Terms(beat_s=1.0)
    with (
        Farm(farm._inventory, ("host",), root=farm._root, terms=terms) as patient,
        patient.open("host", artifact, RECIPE) as kept,
    ):
        (lease,) = patient._devices["host"].lab.call("leases", 10.0)
        threading.Event().wait(3)  # three times its time limit
        assert kept.run_program(PROGRAM)
        assert patient.has(lease)


def test_a_ray_of_our_own_starts_nothing_that_one_machine_needs_not(farm: Farm) -> None:
    # Each takes half a second of CPU to start.
    needless = {"dashboard.py", "log_monitor.py", "monitor.py"}
    started = list[list[str]]()
    for pid in descendants(os.getpid()):
        with suppress(psutil.Error):  # it has ended meanwhile
            started.append(psutil.Process(pid).cmdline())
    assert any(Path(word).name == "raylet" for words in started for word in words), started
    assert not [words for words in started if needless & {Path(word).name for word in words}]
    assert not [words for words in started if words[:1] == ["ray::IDLE"]], "a worker for no actor"


def test_ray_listens_on_the_loopback_interface_only(farm: Farm) -> None:
    mine = descendants(os.getpid()) | {os.getpid()}
    inodes = {inode for pid in mine for inode in socket_inodes(pid)}
    addresses = {address for inode, address in listening() if inode in inodes}
    assert addresses
    assert all(address.startswith("127.") or address == "::1" for address in addresses), addresses


def socket_inodes(pid: int) -> set[str]:
    found = set()
    try:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(file)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        pass
    return found


def listening() -> Iterator[tuple[str, str]]:
    """(inode, address) of every TCP socket in state LISTEN."""
    for family, path in ((socket.AF_INET, "/proc/net/tcp"), (socket.AF_INET6, "/proc/net/tcp6")):
        for line in Path(path).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] != "0A":
                continue
            packed = bytes.fromhex(words[1].split(":")[0])
            # The kernel prints 32-bit words in the machine's byte order.
            packed = b"".join(packed[i : i + 4][::-1] for i in range(0, len(packed), 4))
            yield words[9], socket.inet_ntop(family, packed).removeprefix("::ffff:")


INTERRUPTED = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs us in the background
from pathlib import Path
from harness.farm import Farm
from harness.inventory import DEFAULT
from kvengine.artifact import Artifact
from kvengine.program import Prefill, Program, Reset
from kvengine.recipe import SessionRecipe
with Farm(DEFAULT, ("host",), root=Path(sys.argv[2])) as farm:
    session = farm.open("host", Artifact.open(sys.argv[1]), SessionRecipe(threads=1))
    if sys.argv[3] == "interrupt":
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    elif sys.argv[3] == "kill":
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    else:
        raise ZeroDivisionError
    session.run_program(Program(1000, (Prefill((7,) * 1000, chunk=1), Reset()) * 100))
"""


@pytest.mark.parametrize("how", ["raise", "interrupt", "kill"])
def test_nothing_is_left_running_after_an_exception_an_interrupt_or_a_kill(
    how: str, artifact: Artifact, tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    client = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(artifact.folder), str(tmp_path / "lab"), how],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "KVFARM_TEST_MARK": mark},
    )
    errors = {"raise": "ZeroDivisionError", "interrupt": "KeyboardInterrupt", "kill": ""}
    assert client.returncode != 0
    assert errors[how] in client.stderr
    # Two agents of Ray that were still starting when their head node died look for it for 60 s.
    try:
        wait_until(lambda: not marked(mark), "processes of the client end", 120)
    except InfrastructureError:
        pytest.fail(f"still running: {marked(mark)}")


def marked(mark: str) -> list[str]:
    """Living processes with our mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def test_a_cluster_that_is_not_there_is_an_infrastructure_error() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        client = "from harness.farm import Farm; from harness.inventory import DEFAULT\n"
        client += f"Farm(DEFAULT, ('host',), {address!r}).__enter__()"
        found = subprocess.run(
            [sys.executable, "-c", client], capture_output=True, text=True, timeout=120, check=False
        )
    assert f"InfrastructureError: could not join the Ray cluster at {address}" in found.stderr


def test_a_lab_host_that_is_not_in_the_cluster_is_named(farm: Farm) -> None:
    away = Inventory({"pixel8": DeviceEntry("android", "rack1")}, {"rack1": LabEntry("192.0.2.10")})
    with pytest.raises(InfrastructureError, match=r"'rack1': sought node 192\.0\.2\.10 .* found 127"):
        Farm(away, ("pixel8",)).__enter__()
    assert ray.is_initialized()  # a Ray that the farm did not start is not the farm's to stop


def test_a_farm_that_is_not_open_says_so(artifact: Artifact) -> None:
    with pytest.raises(InfrastructureError, match="not open"):
        Farm(DEFAULT, ("host",)).open("host", artifact, RECIPE)
