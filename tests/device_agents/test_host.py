"""HostDevice: this machine, reached like any other device."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from device_agents import blobs
from device_agents.api import Device
from device_agents.blobs import BlobStore
from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, DeployFailed, RunnerDied
from device_agents.host import HostDevice
from device_agents.local import LocalTransport
from kvengine.artifact import Artifact
from kvengine.errors import ArtifactError, RecipeError
from kvengine.program import Prefill, Program
from kvengine.recipe import SessionRecipe
from tests.device_agents.conftest import FAKE_RUNNER, GRACE_S, make_artifact

CONTENTS = {"model.onnx": b"graph" * 10, "weights.bin": b"numbers" * 100}
WEIGHT = sum(map(len, CONTENTS.values()))


@pytest.fixture
def device(tmp_path: Path, transport: LocalTransport) -> HostDevice:
    return HostDevice("bench", tmp_path / "device", transport, runner_argv=FAKE_RUNNER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_artifact(tmp_path / "artifact", CONTENTS)
    return tmp_path / "artifact"


def blob_path(tmp_path: Path, name: str) -> Path:
    return tmp_path / "device" / "blobs" / hashlib.sha256(CONTENTS[name]).hexdigest()


def test_it_is_a_device(device: HostDevice) -> None:
    as_device: Device = device
    assert as_device.name == "bench"


def test_identity_comes_from_a_runner(device: HostDevice) -> None:
    identity = device.identity(Deadline(30))
    assert (identity.name, identity.kind, identity.simulated) == ("bench", "host", "")
    assert "CPUExecutionProvider" in identity.providers
    assert set(identity.runtime) == {"python", "numpy", "onnxruntime", "kvengine"}


def test_identity_from_a_runner_that_dies_is_an_infrastructure_error(tmp_path: Path) -> None:
    argv = ["sh", "-c", "echo no python here >&2; exit 127"]
    device = HostDevice("bench", tmp_path, LocalTransport(GRACE_S), runner_argv=argv)
    with pytest.raises(RunnerDied, match=r"(?s)exit code 127.*no python here"):
        device.identity(Deadline(30))


def test_vitals_are_this_machines(device: HostDevice) -> None:
    assert device.vitals(Deadline(5)).mem_available_bytes


def test_deploy_brings_a_whole_artifact(device: HostDevice, folder: Path) -> None:
    remote = Path(device.deploy(folder, Deadline(30)))
    assert Artifact.open(remote).manifest == Artifact.open(folder).manifest
    assert remote.name == Artifact.open(folder).id
    assert device.bytes_moved == WEIGHT


def test_a_second_deploy_moves_nothing(device: HostDevice, folder: Path) -> None:
    device.deploy(folder, Deadline(30))
    device.bytes_moved = 0
    device.deploy(folder, Deadline(30))
    assert device.bytes_moved == 0


def test_only_blobs_that_the_device_lacks_move(device: HostDevice, folder: Path, tmp_path: Path) -> None:
    device.deploy(folder, Deadline(30))
    device.bytes_moved = 0
    make_artifact(tmp_path / "other", {**CONTENTS, "model.onnx": b"another graph"})
    device.deploy(tmp_path / "other", Deadline(30))
    assert device.bytes_moved == len(b"another graph")


@pytest.mark.parametrize("damage", [b"numbers", b"Numbers" * 100, b""])
def test_a_damaged_blob_on_the_device_is_replaced(
    damage: bytes, device: HostDevice, folder: Path, tmp_path: Path
) -> None:
    device.deploy(folder, Deadline(30))
    device.bytes_moved = 0
    blob_path(tmp_path, "weights.bin").write_bytes(damage)
    remote = device.deploy(folder, Deadline(30))
    Artifact.open(remote)
    assert device.bytes_moved == len(CONTENTS["weights.bin"])


def test_an_interrupted_deploy_leaves_no_artifact_and_resumes(
    device: HostDevice, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(blobs, "_PIECE", 64)
        write, calls = BlobStore.write, iter(range(4))

        def cable_pulled(store: BlobStore, sha256: str, offset: int, data: bytes) -> int:
            if next(calls, None) is None:
                raise DeployFailed("the cable was pulled")
            return write(store, sha256, offset, data)

        patch.setattr(BlobStore, "write", cable_pulled)
        with pytest.raises(DeployFailed, match="cable"):
            device.deploy(folder, Deadline(30))
    assert list((tmp_path / "device" / "artifacts").iterdir()) == []
    Artifact.open(device.deploy(folder, Deadline(30)))
    assert device.bytes_moved == WEIGHT - 3 * 64


def test_a_late_deploy_is_late(device: HostDevice, folder: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="copying blob"):
        device.deploy(folder, Deadline(0))


def test_a_source_unlike_its_manifest_never_becomes_a_blob(
    device: HostDevice, folder: Path, tmp_path: Path
) -> None:
    (folder / "weights.bin").write_bytes(b"Numbers" * 100)
    with pytest.raises(DeployFailed, match="sought sha256"):
        device.deploy(folder, Deadline(30))
    assert not blob_path(tmp_path, "weights.bin").exists()


def test_a_folder_that_is_no_artifact_is_refused(device: HostDevice, tmp_path: Path) -> None:
    with pytest.raises(DeployFailed, match=r"sought artifact\.json"):
        device.deploy(tmp_path, Deadline(30))


def test_free_space_is_checked_before_anything_moves(
    device: HostDevice, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "FREE_RESERVE_BYTES", 1 << 60)
    with pytest.raises(DeployFailed, match=f"sought {WEIGHT:,} bytes"):
        device.deploy(folder, Deadline(30))
    assert device.bytes_moved == 0


def test_a_session_runs_in_a_process_of_its_own(device: HostDevice, folder: Path) -> None:
    remote = device.deploy(folder, Deadline(30))
    recipe = SessionRecipe(threads=1, environment={"FAKE_NOTE": "from the recipe"})
    session = device.open_session(remote, recipe, Deadline(30))
    assert session.info.session == recipe
    assert session.info.notes == ("from the recipe",)
    assert session.run_program(Program(4, (Prefill((2,)),)))[0].position == 1
    session.close()


def test_the_real_runner_refuses_a_missing_artifact(tmp_path: Path) -> None:
    device = HostDevice("bench", tmp_path, LocalTransport(GRACE_S))
    with pytest.raises(ArtifactError, match=r"sought artifact\.json"):
        device.open_session(str(tmp_path / "none"), SessionRecipe(), Deadline(60))


def test_the_real_runner_refuses_an_unknown_provider(tmp_path: Path) -> None:
    device = HostDevice("bench", tmp_path / "device", LocalTransport(GRACE_S))
    make_artifact(tmp_path / "artifact", CONTENTS)
    remote = device.deploy(tmp_path / "artifact", Deadline(30))
    with pytest.raises(RecipeError, match="abacus"):
        device.open_session(remote, SessionRecipe(provider="abacus"), Deadline(60))
