"""Lab agents on this host whose engines are fake, and what a client does with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.api import Device
from device_agents.blobs import BlobStore
from device_agents.config import DeviceConfig
from device_agents.host import HostDevice
from device_agents.lab_agent import LabAgent
from device_agents.local import LocalTransport
from device_agents.remote_session import Budgets
from kvengine.artifact import Manifest
from kvengine.program import Prefill, Program
from kvengine.recipe import SessionRecipe
from tests.device_agents.conftest import FAKE_RUNNER, GRACE_S, make_manifest

GOOD = Program(8, (Prefill((1, 2, 3)),))
CONTENTS = {"model.onnx": b"graph", "weights.bin": b"numbers"}
TWO = (DeviceConfig("left", threads=1), DeviceConfig("right", threads=2))
RECIPE = SessionRecipe()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_fake(config: DeviceConfig, store: BlobStore) -> Device:
    argv = ["sh", "-c", "echo unplugged >&2; exit 9"] if "broken" in config.options else FAKE_RUNNER
    budgets = Budgets(program_s=30, close_s=5)
    return HostDevice(
        config.name, store.root, LocalTransport(GRACE_S), store=store, runner_argv=argv, budgets=budgets
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def agent(tmp_path: Path, clock: Clock) -> Iterator[LabAgent]:
    agent = LabAgent(tmp_path / "lab", TWO, make=make_fake, clock=clock, reap_every_s=None)
    yield agent
    agent.shutdown()


def upload(agent: LabAgent, contents: dict[str, bytes] = CONTENTS, chunk: int = 4) -> Manifest:
    """As a client does it."""
    manifest = make_manifest(contents)
    by_sha256 = {hashlib.sha256(data).hexdigest(): data for data in contents.values()}
    for blob in agent.missing_blobs(manifest.to_json()):
        data = by_sha256[blob.sha256]
        for offset in range(blob.present, len(data), chunk):
            agent.put_chunk(blob.sha256, offset, data[offset : offset + chunk])
        agent.commit_blob(blob.sha256)
    return manifest


def open_session(agent: LabAgent, device: str, token: int, recipe: SessionRecipe = RECIPE) -> str:
    artifact = agent.deploy(device, token, upload(agent).to_json())
    session_id, _ = agent.open_session(device, token, artifact, recipe)
    return session_id
