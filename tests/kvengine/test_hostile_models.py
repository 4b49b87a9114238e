"""Hostile and damaged ONNX files: inspecting is a typed answer each, and reads nothing it should not."""

from __future__ import annotations

import itertools
import os
import random
import struct
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kvengine.errors import ContractIncomplete, InvalidModel, KvEngineError, UnsupportedModel
from kvengine.export.foreign import adopt, inspect_model, reading
from tests import foreign_models, fuzzing

FILES = fuzzing.count(in_test=300, in_soak=10_000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_models.checkpoint(tmp_path_factory.mktemp("hostile") / "checkpoint")


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> list[onnx.ModelProto]:
    folder = checkpoint.parent
    paths = [
        foreign_models.decomposed(checkpoint, folder / "decomposed.onnx"),
        foreign_models.scattering(checkpoint, folder / "scattering.onnx"),
        foreign_models.scattering(checkpoint, folder / "ring.onnx", rows=9),
        foreign_models.by_operator(folder / "quantized.onnx", "int4"),
    ]
    return [onnx.load(path) for path in paths]


def test_every_damaged_file_is_inspected_or_refused_by_type(
    models: list[onnx.ModelProto], tmp_path: Path
) -> None:
    draw, path = random.Random(4), tmp_path / "model.onnx"
    whole = [model.SerializeToString() for model in models]
    outcomes: dict[str, int] = {}
    slowest = 0.0
    for _ in range(FILES):
        if draw.random() < 0.3:
            data = fuzzing.damaged(draw, draw.choice(whole))
        else:
            data = fuzzing.damaged_model(draw, draw.choice(models))
        path.write_bytes(data)
        began = time.monotonic()
        try:
            inspect_model(path)
            outcome = "inspected"
        except KvEngineError as error:
            outcome = type(error).__name__
        slowest = max(slowest, time.monotonic() - began)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert {"inspected", "InvalidModel", "UnsupportedModel"} <= set(outcomes), outcomes
    assert slowest < 30  # no hang; a file takes milliseconds


def test_a_cyclic_graph_is_refused(models: list[onnx.ModelProto], tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(models[0])
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InvalidModel, match="cyclic or out of order"):
        inspect_model(tmp_path / "model.onnx")


def test_two_makers_of_a_value_are_refused(models: list[onnx.ModelProto], tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(models[0])
    model.graph.node[5].output[0] = model.graph.node[4].output[0]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InvalidModel, match=r"two makers|nothing makes"):
        inspect_model(tmp_path / "model.onnx")


def test_identity_in_long_chains_is_followed_without_recursion(tmp_path: Path) -> None:
    """20,000 of them: a recursive walk would overflow the stack."""
    names = [f"x{i}" for i in range(20_001)]
    nodes = [helper.make_node("Identity", [a], [b]) for a, b in itertools.pairwise(names)]
    shape = ["b", 1, "s", 2]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, shape)],
    )
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises((UnsupportedModel, ContractIncomplete)):
        inspect_model(tmp_path / "model.onnx").complete()


def test_deeply_nested_subgraphs_are_refused(tmp_path: Path) -> None:
    """Beyond protobuf's limit of 100, written by hand since its own classes would not."""
    data = b""
    for _ in range(20_000):  # ModelProto.graph (7) > node (1) > attribute (5) > g (6) > node ...
        data = _field(1, _field(5, _field(6, data)))
    (tmp_path / "model.onnx").write_bytes(_field(7, data))
    with pytest.raises(InvalidModel, match="not an ONNX model"):
        inspect_model(tmp_path / "model.onnx")


def test_only_plain_files_of_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")  # reading one would wait for ever
    for name in ("pipe.onnx", ".", "none.onnx"):
        with pytest.raises(InvalidModel, match="sought an ONNX model"):
            inspect_model(tmp_path / name)
    huge = tmp_path / "huge.onnx"
    with huge.open("wb") as file:
        file.truncate(reading.MAX_BYTES + 1)  # sparse
    with pytest.raises(InvalidModel, match=r"found 2,147,483,648; save larger models with external data"):
        inspect_model(huge)
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(InvalidModel, match="found 0"):
        inspect_model(tmp_path / "empty.onnx")


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/hostname", "a/../../secret", "link", "loop", "..\\secret", "", "\0", "x" * 5000],
)
def test_data_outside_the_folder_is_not_followed(
    models: list[onnx.ModelProto], checkpoint: Path, tmp_path: Path, location: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(100_000))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder / "loop")
    onnx.save(_external(models[0], location), folder / "model.onnx")
    with pytest.raises(InvalidModel, match=r"outside the model's folder|no such file|the data of"):
        inspect_model(folder / "model.onnx")
    with pytest.raises(InvalidModel):
        adopt(folder / "model.onnx", checkpoint, tmp_path / "artifacts")
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("offset", "length"),
    [("-1", "8"), ("0", "9" * 30), ("9" * 19, "8"), ("0", "1"), ("99999", "0"), ("x", "8")],
)
def test_data_beyond_its_file_is_refused(
    models: list[onnx.ModelProto], tmp_path: Path, offset: str, length: str
) -> None:
    (tmp_path / "weights").write_bytes(bytes(1000))
    onnx.save(_external(models[0], "weights", offset, length), tmp_path / "model.onnx")
    with pytest.raises(InvalidModel):
        inspect_model(tmp_path / "model.onnx")


def test_data_in_the_folder_is_taken_along(checkpoint: Path, tmp_path: Path) -> None:
    inline = foreign_models.decomposed(checkpoint, tmp_path / "inline.onnx")
    model = tmp_path / "model" / "decoder.onnx"
    model.parent.mkdir()
    onnx.save_model(
        onnx.load(inline), model, save_as_external_data=True, location="weights", size_threshold=64
    )
    assert inspect_model(model).file.data == ("weights",)
    artifact = adopt(model, checkpoint, tmp_path / "artifacts")
    assert {blob.name for blob in artifact.manifest.blobs} == {"model.onnx", "weights"}
    assert adopt(model, checkpoint, tmp_path / "artifacts").folder == artifact.folder
    # Altered since: another artifact, and the old one is found to be damaged where they share the file.
    with (model.parent / "weights").open("r+b") as file:
        file.write(b"\xff\xff")
    assert adopt(model, checkpoint, tmp_path / "artifacts").id != artifact.id


def test_data_in_a_subfolder_is_refused_with_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    proto = onnx.load(foreign_models.decomposed(checkpoint, tmp_path / "inline.onnx"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights").write_bytes(bytes(100_000))
    onnx.save(_external(proto, "data/weights"), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModel, match="save it again"):
        adopt(tmp_path / "model.onnx", checkpoint, tmp_path / "artifacts")


def _external(model: onnx.ModelProto, location: str, offset: str = "0", length: str = "0") -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.CopyFrom(model)
    tensor = next(t for t in found.graph.initializer if len(t.dims) == 2)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return found


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, length = len(content), b""
    while size > 0x7F:
        length += struct.pack("B", size & 0x7F | 0x80)
        size >>= 7
    return struct.pack("B", number << 3 | 2) + length + struct.pack("B", size) + content


def test_tensors_of_negative_shape_are_refused(models: list[onnx.ModelProto], tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(models[0])
    bad = numpy_helper.from_array(np.zeros(3, np.float32), "bad")
    bad.dims[0] = -3
    model.graph.initializer.append(bad)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InvalidModel, match=r"shape \[-3\]"):
        inspect_model(tmp_path / "model.onnx")
