"""A graph that crashes onnxruntime costs one runner: it is named as what died, and the device goes on.

onnxruntime 1.32 divides int64 without looking: -2**63 / -1 ends the process with SIGFPE on x86-64, in
constant folding when the graph is loaded, or in the kernel when it is run. Elsewhere that division is
defined and returns, so there a graph of the same kind does no harm and these tests say they were skipped.
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from device_agents.deadline import Deadline
from device_agents.errors import RunnerDied
from device_agents.host import HostDevice
from device_agents.local import LocalTransport
from kvengine.export.foreign import adopt
from kvengine.program import Prefill, Program
from kvengine.recipe import SessionRecipe
from tests import foreign_models
from tests.device_agents.conftest import GRACE_S

PROGRAM = Program(8, (Prefill((3, 4, 5)),))

pytestmark = pytest.mark.skipif(
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
