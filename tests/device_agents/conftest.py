"""Runners with a fake engine, and the certainty that no test leaves one behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from device_agents.deadline import Deadline
from device_agents.local import LocalTransport
from device_agents.remote_session import Budgets, RunnerSession
from device_agents.streams import ProcessStream
from kvengine.artifact import Blob, Manifest
from kvengine.plan import LayerPlan
from kvengine.recipe import ExportRecipe, SessionRecipe
from kvengine.spec import LayerSpec, ModelSpec, RopeSpec

FAKE_RUNNER = (sys.executable, "-P", str(Path(__file__).parent / "fake_runner.py"))
GRACE_S = 0.5  # of each polite way to end a process

# A loaded machine is no reason to fail.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

OpenSession = Callable[..., RunnerSession]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> set[int]:
    """Our child processes, zombies too; not those that another test started and that live as long as we."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        # A thread that was joined may still be listed for a moment.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return {pid for pid in found if not _lives_as_long_as_we(pid)}


def _lives_as_long_as_we(pid: int) -> bool:
    """Python's own helper, and the database server of tests/postgres.py."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"multiprocessing.resource_tracker" in command or b"tests.postgres" in command
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Fails when ``condition`` does not come true in time."""
    deadline, pause = Deadline(within_s), threading.Event()
    while not condition():
        assert not deadline.expired, f"still not true after {within_s} s"
        pause.wait(0.02)


def group_is_gone(group: int, within_s: float = 5.0) -> bool:
    """Whether no process of the group lives; the kernel may need a moment to finish a killed one."""
    deadline, pause = Deadline(within_s), threading.Event()
    while alive := _members(group):
        if deadline.expired:
            return False
        pause.wait(0.02)
    return not alive


def _members(group: int) -> list[int]:
    """Zombies do not count: an orphan's is for init to reap."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(its_group) == group and state not in "ZX":
                found.append(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = open_descriptors()
    already = children()
    yield
    assert children() - already == set(), "a process was left behind"
    assert open_descriptors() == before, "a file descriptor was left open"


@pytest.fixture
def transport() -> LocalTransport:
    return LocalTransport(grace_s=GRACE_S)


@pytest.fixture
def streams(transport: LocalTransport) -> list[ProcessStream]:
    """Every stream that ``open_session`` has started."""
    return []


@pytest.fixture
def open_session(transport: LocalTransport, streams: list[ProcessStream]) -> Iterator[OpenSession]:
    """A session with a fake engine: ``open_session(program_s=0.5, folder="x", environment={})``."""

    def start(
        program_s: float = 30.0, folder: str = "folder", environment: dict[str, str] | None = None
    ) -> RunnerSession:
        stream = transport.open_stream(FAKE_RUNNER, environment or {})
        streams.append(stream)
        budgets = Budgets(program_s=program_s, workload_s=30, vitals_s=30, close_s=5)
        return RunnerSession.open(stream, folder, SessionRecipe(threads=2), Deadline(30), budgets)

    yield start
    for stream in streams:
        stream.close()


def make_manifest(contents: dict[str, bytes]) -> Manifest:
    """A manifest of blobs with these names and contents; the model itself does not matter here."""
    spec = ModelSpec(
        "gemma3_text", 5, 8, 16, 2, 64, 0.5, 1e-6, True, (LayerSpec(None, 0, 1, 4),), (RopeSpec(1e4),)
    )
    blobs = tuple(Blob(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in contents.items())
    plan = (LayerPlan("static", "float32", None),)
    return Manifest(spec, ExportRecipe(), plan, blobs, "checkpoint", "0" * 64, {}, {})


def make_artifact(folder: Path, contents: dict[str, bytes]) -> Manifest:
    """An artifact in ``folder`` whose files are what its manifest says."""
    manifest = make_manifest(contents)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "artifact.json").write_text(manifest.to_json())
    return manifest
