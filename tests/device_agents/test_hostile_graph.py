"""A graph that crashes onnxruntime costs one runner: it is named as what died, and the device goes on.

onnxruntime 1.32 divides int64 without looking: -2**63 / -1 ends the process with SIGFPE on x86-64, in
constant folding when the graph is loaded, or in the kernel when it is run. Elsewhere that division is
defined and returns, so there a graph of the same kind does no harm and these tests say they were skipped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from device_agents.deadline import Deadline
from device_agents.errors import RunnerDied
from device_agents.host import HostDevice
from device_agents.local import LocalTransport
from device_agents.streams import ProcessStream
from kvengine.artifact import MANIFEST, MODEL, Artifact, Blob
from kvengine.export.foreign import adopt
from kvengine.program import Prefill, Program
from kvengine.recipe import SessionRecipe
from tests import foreign_models, fuzzing
from tests.device_agents.conftest import GRACE_S

ROOT = Path(__file__).parents[2]
PROGRAM = Program(8, (Prefill((3, 4, 5)),))

GRAPHS = fuzzing.count(in_test=40, in_soak=3000)
WORKER = (sys.executable, "-P", str(Path(__file__).parent / "hostile_worker.py"))

traps = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="int64 overflow in a division traps on x86-64 only"
)


def hostile(model: onnx.ModelProto, when: str) -> onnx.ModelProto:
    """The same decoder with a division added that onnxruntime dies of, on loading or on running."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([-(2**63)], np.int64), "least"))
    divisor = "minus_one"
    if when == "load":
        graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), divisor))
    else:  # the shape of the token ids is not known before the run: 0 * it - 1
        extra = [
            helper.make_node("Shape", ["input_ids"], ["ids_shape"], start=0, end=1),
            helper.make_node("Sub", ["ids_shape", "ids_shape"], ["ids_zero"]),
            helper.make_node("Sub", ["ids_zero", "one"], [divisor]),
        ]
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "one"))
        graph.node.extend(extra)
    graph.node.append(helper.make_node("Div", ["least", divisor], ["quotient"]))
    graph.output.append(helper.make_tensor_value_info("quotient", onnx.TensorProto.INT64, [1]))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_models.checkpoint(tmp_path_factory.mktemp("hostile") / "checkpoint")


@traps
@pytest.mark.parametrize("when", ["load", "run"])
def test_only_the_runner_dies_and_is_named(when: str, checkpoint: Path, tmp_path: Path) -> None:
    good = foreign_models.decomposed(checkpoint, tmp_path / "good.onnx")
    bad = tmp_path / "bad.onnx"
    onnx.save(hostile(onnx.load(good), when), bad)
    device = HostDevice("bench", tmp_path / "device", LocalTransport(GRACE_S))
    harmless, harmful = (adopt(path, checkpoint, tmp_path / "artifacts") for path in (good, bad))
    with pytest.raises(RunnerDied) as death:
        _run(device, harmful.folder)
    assert "killed by SIGFPE" in str(death.value)
    assert f"artifact {harmful.id}" in str(death.value)
    assert ("open:" if when == "load" else "run_program:") in str(death.value)
    assert _run(device, harmless.folder) == (3,)


def _run(device: HostDevice, folder: Path) -> tuple[int, ...]:
    """Tokens held after the program."""
    remote = device.deploy(folder, Deadline(30))
    session = device.open_session(remote, SessionRecipe(threads=1), Deadline(60))
    try:
        (seen,) = session.run_program(PROGRAM)
    finally:
        session.close()
    assert seen.error is None
    return seen.positions


def test_damaged_graphs_end_in_a_type_or_in_the_runner(checkpoint: Path, tmp_path: Path) -> None:
    """What onnxruntime makes of them: it runs them, refuses them, or dies; nothing else, and none hangs."""
    sources = [
        foreign_models.decomposed(checkpoint, tmp_path / "decomposed.onnx"),
        foreign_models.scattering(checkpoint, tmp_path / "scattering.onnx"),
        hostile_path(checkpoint, tmp_path),
    ]
    artifacts = [adopt(path, checkpoint, tmp_path / "artifacts") for path in sources]
    models = [onnx.load(path) for path in sources]
    draw = random.Random(11)
    outcomes: Counter[str] = Counter()
    with Worker() as worker:
        for number in range(GRAPHS):
            # Every 20th is one that is known to end the process.
            chosen = 2 if number % 20 == 7 else draw.randrange(2)
            data = (
                models[2].SerializeToString() if chosen == 2 else fuzzing.damaged_model(draw, models[chosen])
            )
            outcomes[worker.outcome(_with_model(artifacts[chosen], data, tmp_path / "artifact"))] += 1
    allowed = {"ran", "EngineFailure", "ArtifactError", "MemoryError"}
    strange = {name for name in outcomes if name not in allowed and not name.startswith("killed by SIG")}
    assert not strange, outcomes
    assert {"ran", "EngineFailure"} <= set(outcomes), outcomes
    if platform.machine() == "x86_64":
        assert outcomes["killed by SIGFPE"] >= GRAPHS // 20


def hostile_path(checkpoint: Path, folder: Path) -> Path:
    good = foreign_models.decomposed(checkpoint, folder / "harmless.onnx")
    onnx.save(hostile(onnx.load(good), "load"), folder / "hostile.onnx")
    return folder / "hostile.onnx"


def _with_model(artifact: Artifact, data: bytes, folder: Path) -> Path:
    """``artifact`` with another graph, whole by its own manifest."""
    folder.mkdir(exist_ok=True)
    blob = Blob(MODEL, hashlib.sha256(data).hexdigest(), len(data))
    manifest = dataclasses.replace(artifact.manifest, blobs=(blob,))
    (folder / MODEL).write_bytes(data)
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


class Worker:
    """A process that opens artifacts; started again whenever one has ended it."""

    def __init__(self) -> None:
        self._stream: ProcessStream | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def outcome(self, folder: Path) -> str:
        """Its line, or how it was killed. Raises DeadlineExceeded: it hangs."""
        deadline = Deadline(60)
        if self._stream is None:
            self._stream = ProcessStream(WORKER, {**os.environ, "PYTHONPATH": str(ROOT)}, grace_s=GRACE_S)
        line = b""
        try:
            self._stream.write(f"{folder}\n".encode(), deadline)
            while not line.endswith(b"\n"):
                line += self._stream.read_exactly(1, deadline)
        except RunnerDied as death:
            self._stream.close()
            self._stream = None
            return str(death).rpartition(": ")[2]
        return line.decode().strip()
