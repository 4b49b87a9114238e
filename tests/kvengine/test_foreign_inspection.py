"""The contract of a foreign graph: inferred where the graph says it, asked for by name where not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kvengine.codec import decode, encode
from kvengine.contract import Contract, InputContract
from kvengine.errors import ContractIncomplete, InvalidModel, RecipeError, UnsupportedModel
from kvengine.export.foreign import adopt, inspect_model
from kvengine.plan import CacheDtype
from tests import foreign_models
from tests.foreign_models import HEAD_DIM, KV_HEADS, VOCABULARY, WINDOW, Graph


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspected")


@pytest.fixture(scope="module")
def full(folder: Path) -> Path:
    return foreign_models.checkpoint(folder / "full")


@pytest.fixture(scope="module")
def windowed(folder: Path) -> Path:
    return foreign_models.checkpoint(folder / "windowed", WINDOW)


def roles(contract: Contract) -> dict[str, str]:
    return {entry.name: entry.role for entry in contract.inputs}


def changed(model: Path, path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.load(model)
    change(proto)
    onnx.save(proto, path)
    return path


# -- inferred -------------------------------------------------------------------------------------


@pytest.mark.parametrize("position_ids", [True, False])
def test_optimum_grows_and_hands_over(full: Path, tmp_path: Path, position_ids: bool) -> None:
    model = foreign_models.decomposed(full, tmp_path / "model.onnx", position_ids=position_ids)
    contract = inspect_model(model).complete()
    wanted = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    assert roles(contract) == wanted | ({"position_ids": "position_ids"} if position_ids else {})
    assert (contract.kind, contract.logits, contract.logits_rows) == ("growing", "logits", "all")
    assert (contract.vocab_size, contract.batch, contract.rows) == (VOCABULARY, None, None)
    first = contract.layers[0]
    assert (first.past_key, first.present_value) == ("past_key_values.0.key", "present.0.value")
    assert (first.kind, first.layout, first.dtype) == ("growing", "bnsh", "float32")
    assert (first.kv_heads, first.head_dim, first.shared) == (KV_HEADS, HEAD_DIM, False)


def test_a_linear_scatter_is_a_shared_buffer(full: Path, tmp_path: Path) -> None:
    contract = inspect_model(foreign_models.scattering(full, tmp_path / "model.onnx")).complete()
    assert roles(contract) == {
        "input_ids": "input_ids",
        "write_indices": "write_indices",
        "nonpad_kv_seqlen": "valid_lengths",
    }
    first = contract.layers[0]
    assert (first.kind, first.rows, first.shared, first.max_step) == ("static", None, True, None)


def test_a_fixed_buffer_limits_the_context(full: Path, tmp_path: Path) -> None:
    model = foreign_models.scattering(full, tmp_path / "model.onnx", rows=24, circular=False)
    assert inspect_model(model).complete().rows == 24
    artifact = adopt(model, full, tmp_path / "artifacts")
    assert artifact.manifest.spec.max_position == 24


def test_a_ring_asks_for_its_window_and_bounds_a_step(windowed: Path, tmp_path: Path) -> None:
    model = foreign_models.scattering(windowed, tmp_path / "model.onnx", rows=9)
    found = inspect_model(model)
    assert [question.key for question in found.questions] == ["past.window"]
    with pytest.raises(ContractIncomplete, match=r"--set past\.window=…"):
        found.complete()
    layer = inspect_model(model, {"past.window": "5"}).complete().layers[0]
    assert (layer.kind, layer.rows, layer.window, layer.max_step) == ("windowed", 9, 5, 5)
    # The checkpoint says it too.
    assert adopt(model, windowed, tmp_path / "artifacts").manifest.recipe.cache.kind == "hybrid"


def test_structure_wins_over_names(full: Path, tmp_path: Path) -> None:
    """Inputs are told by the operator slots they feed, whatever they are called."""
    model = foreign_models.scattering(full, tmp_path / "model.onnx")

    def rename(proto: onnx.ModelProto) -> None:
        names = {"write_indices": "wo", "nonpad_kv_seqlen": "position_ids"}
        for value in proto.graph.input:
            value.name = names.get(value.name, value.name)
        for node in proto.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]

    contract = inspect_model(changed(model, tmp_path / "renamed.onnx", rename)).complete()
    assert roles(contract) == {
        "input_ids": "input_ids",
        "wo": "write_indices",
        "position_ids": "valid_lengths",
    }


def test_genai_config_names_what_the_graph_leaves_open(tmp_path: Path) -> None:
    model = foreign_models.by_operator(tmp_path / "model.onnx")
    # GroupQueryAttention itself tells nearly all; the builder leaves head_dim symbolic.
    assert [question.key for question in inspect_model(model).questions] == ["past.head_dim"]
    write_genai_config(tmp_path)
    contract = inspect_model(model).complete()
    assert contract.convention.startswith("onnxruntime-genai")
    layer = contract.layers[0]
    assert (layer.kind, layer.shared, layer.window, layer.head_dim) == ("static", True, WINDOW, HEAD_DIM)
    assert roles(contract) == {
        "input_ids": "input_ids",
        "lengths": "seqlens_k",
        "total": "total_length",
    }


def test_genai_without_a_shared_buffer_grows(tmp_path: Path) -> None:
    model = foreign_models.by_operator(tmp_path / "model.onnx")
    write_genai_config(tmp_path, shared=False)
    assert inspect_model(model).complete().kind == "growing"


def test_past_that_others_read_too_is_not_overwritten(tmp_path: Path) -> None:
    """Lengths taken from past's shape are wrong once past is a whole buffer."""
    model = foreign_models.by_operator(tmp_path / "model.onnx")
    write_genai_config(tmp_path)

    def read_twice(proto: onnx.ModelProto) -> None:
        proto.graph.node.append(helper.make_node("Shape", ["past_key_values.0.key"], ["its_shape"]))

    layer = inspect_model(changed(model, tmp_path / "model.onnx", read_twice)).complete().layers[0]
    assert (layer.kind, layer.shared) == ("growing", False)


def test_a_contract_survives_json(full: Path, tmp_path: Path) -> None:
    contract = inspect_model(foreign_models.scattering(full, tmp_path / "model.onnx")).complete()
    assert decode(Contract, json.loads(json.dumps(encode(contract)))) == contract


# -- asked for ------------------------------------------------------------------------------------


def test_an_input_that_nothing_tells_is_asked_for(full: Path, tmp_path: Path) -> None:
    def rename(proto: onnx.ModelProto) -> None:
        for value in proto.graph.input:
            value.name = value.name.replace("position_ids", "where")
        for node in proto.graph.node:
            node.input[:] = [name.replace("position_ids", "where") for name in node.input]

    plain = foreign_models.decomposed(full, tmp_path / "plain.onnx")
    model = changed(plain, tmp_path / "model.onnx", rename)
    (question,) = inspect_model(model).questions
    assert question.key == "input.where"
    contract = inspect_model(model, {"input.where": "position_ids"}).complete()
    assert InputContract("where", "position_ids", "int64", 2) in contract.inputs


def test_a_writer_that_does_not_tell_axes_is_asked_about(full: Path, tmp_path: Path) -> None:
    model = foreign_models.scattering(full, tmp_path / "model.onnx", rows=24, circular=False)

    def scatter(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            if node.op_type == "TensorScatter":
                node.op_type = "ScatterND"
                del node.attribute[:]

    found = inspect_model(changed(model, tmp_path / "other.onnx", scatter))
    assert {question.key for question in found.questions} == {"past.layout"}
    layer = inspect_model(tmp_path / "other.onnx", {"past.layout": "bnsh"}).complete().layers[0]
    assert (layer.kind, layer.layout, layer.rows) == ("static", "bnsh", 24)


def test_logits_of_another_name_are_asked_for(full: Path, tmp_path: Path) -> None:
    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.output[-1].name = proto.graph.node[-1].output[0] = "scores"

    plain = foreign_models.decomposed(full, tmp_path / "plain.onnx")
    model = changed(plain, tmp_path / "model.onnx", rename)
    (question,) = inspect_model(model).questions
    assert question.key == "logits"
    assert "scores" in question.why
    assert inspect_model(model, {"logits": "scores"}).complete().logits == "scores"


@pytest.mark.parametrize(
    ("answer", "value", "message"),
    [
        ("past.layout", "nbsh", "sought one of bnsh, bsnh, bnhs"),
        ("past.window", "five", "sought a whole number"),
        ("past.colour", "red", "unknown; there are past.layout"),
        ("input.nobody", "input_ids", "has no input 'nobody'"),
        ("input.input_ids", "token", "sought one of input_ids"),
        ("logits", "nothing", "sought one of"),
    ],
)
def test_an_answer_to_no_question_is_refused(
    full: Path, tmp_path: Path, answer: str, value: str, message: str
) -> None:
    model = foreign_models.decomposed(full, tmp_path / "model.onnx")
    with pytest.raises(RecipeError, match=message):
        inspect_model(model, {answer: value})


# -- refused --------------------------------------------------------------------------------------


def test_a_model_without_cache_is_refused(tmp_path: Path) -> None:
    graph = Graph()
    graph.output("logits", ["b", "s", 3])
    graph.op("Cast", graph.input("input_ids", ["b", "s"]), name="logits", to=TensorProto.FLOAT)
    with pytest.raises(UnsupportedModel, match="text-generation-with-past"):
        inspect_model(graph.save(tmp_path / "model.onnx", "", 18))


def test_cross_attention_is_refused(full: Path, tmp_path: Path) -> None:
    def rename(name: str) -> str:
        return name.replace("0.key", "0.encoder.key")

    with pytest.raises(UnsupportedModel, match=r"0\.encoder\.key"):
        inspect_model(foreign_models.decomposed(full, tmp_path / "model.onnx", rename=rename))


def test_another_checkpoints_model_is_refused(full: Path, tmp_path: Path) -> None:
    model = foreign_models.decomposed(full, tmp_path / "model.onnx")
    config = json.loads((full / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((full / "model.safetensors").read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UnsupportedModel, match=r"layers: sought 3.*found 2"):
        adopt(model, other, tmp_path / "artifacts")


# -- support --------------------------------------------------------------------------------------


def write_genai_config(folder: Path, shared: bool = True, **decoder: Any) -> None:
    config = {
        "model": {
            "decoder": {
                "filename": "model.onnx",
                "head_size": HEAD_DIM,
                "num_key_value_heads": KV_HEADS,
                "inputs": {
                    "input_ids": "input_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {"logits": "logits"},
                **decoder,
            }
        },
        "search": {"past_present_share_buffer": shared},
    }
    (folder / "genai_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "text",
    ["", "[" * 100_000, "[]", '{"model": 3}', '{"model": {"decoder": {"inputs": [], "outputs": {}}}}'],
)
def test_a_senseless_genai_config_is_refused(tmp_path: Path, text: str) -> None:
    model = foreign_models.by_operator(tmp_path / "model.onnx")
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(InvalidModel, match=r"genai_config\.json"):
        inspect_model(model)


@pytest.mark.parametrize("size", [0, -1, 2**40, True, "16"])
def test_a_senseless_head_size_is_refused(tmp_path: Path, size: object) -> None:
    model = foreign_models.by_operator(tmp_path / "model.onnx")
    write_genai_config(tmp_path, head_size=size)
    with pytest.raises(InvalidModel, match="head_size"):
        inspect_model(model)


# -- quantized caches -----------------------------------------------------------------------------


@pytest.mark.parametrize(("cache", "stored"), [("int8", HEAD_DIM), ("int4", HEAD_DIM // 2)])
def test_a_quantized_cache_is_told_with_its_scales(cache: CacheDtype, stored: int, tmp_path: Path) -> None:
    found = inspect_model(foreign_models.by_operator(tmp_path / "model.onnx", cache))
    layer = found.complete().layers[0]
    assert (layer.dtype, layer.head_dim) == (cache, HEAD_DIM)
    assert layer.shape(2, 7) == (2, KV_HEADS, 7, stored)
    ((key, value),) = found.scales
    assert np.array_equal(key, np.arange(1, 1 + KV_HEADS * HEAD_DIM).reshape(KV_HEADS, HEAD_DIM))
    assert np.array_equal(value, np.full((KV_HEADS, HEAD_DIM), 0.5)), "one scale for all is spread out"


def scale_of(proto: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == "key_scale")


def short(proto: onnx.ModelProto) -> None:
    scale_of(proto).CopyFrom(numpy_helper.from_array(np.ones(3, np.float32), "key_scale"))


def endless(proto: onnx.ModelProto) -> None:
    scale_of(proto).CopyFrom(numpy_helper.from_array(np.full(1, np.inf, np.float32), "key_scale"))


def torn(proto: onnx.ModelProto) -> None:
    scale_of(proto).raw_data = b"abc"


def fed(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[12] = "attended_before"
    proto.graph.input.append(helper.make_tensor_value_info("attended_before", TensorProto.FLOAT, [1]))


def unsaid(proto: onnx.ModelProto) -> None:
    kept = [a for a in proto.graph.node[0].attribute if a.name != "kv_cache_bit_width"]
    del proto.graph.node[0].attribute[:]
    proto.graph.node[0].attribute.extend(kept)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (short, InvalidModel, "sought 1 or 32 finite numbers, found 3"),
        (endless, InvalidModel, "finite numbers"),
        (torn, InvalidModel, "'key_scale' cannot be read"),
        (fed, UnsupportedModel, "its scales as constants of the graph"),
        (unsaid, UnsupportedModel, "kv_cache_bit_width is not 4"),
    ],
)
def test_scales_that_are_not_known_are_refused(
    change: Callable[[onnx.ModelProto], None], error: type[Exception], said: str, tmp_path: Path
) -> None:
    model = foreign_models.by_operator(tmp_path / "model.onnx", "int4")
    answers = {"input.attended_before": "new_lengths"} if change is fed else {}
    with pytest.raises(error, match=said):
        inspect_model(changed(model, tmp_path / "changed.onnx", change), answers)


def test_a_quantized_cache_of_another_writer_is_refused(full: Path, tmp_path: Path) -> None:
    model = foreign_models.scattering(full, tmp_path / "model.onnx")

    def to_int8(proto: onnx.ModelProto) -> None:
        for value in (*proto.graph.input, *proto.graph.output):
            if "past" in value.name or "present" in value.name:
                value.type.tensor_type.elem_type = TensorProto.INT8

    with pytest.raises(UnsupportedModel, match="written by TensorScatter: its scales are not known"):
        inspect_model(changed(model, tmp_path / "changed.onnx", to_int8))
