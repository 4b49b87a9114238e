"""An exported artifact computes what transformers computes, whatever the precision and cache plan."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest

from harness.synth import synth
from kvengine.artifact import Artifact
from kvengine.codec import decode, encode
from kvengine.errors import CheckpointError, InvalidRequest, InvalidToken
from kvengine.export import export
from kvengine.export.quantize import dequantize_rows
from kvengine.plan import CacheDtype, CachePlan, PlanKind
from kvengine.recipe import ExportRecipe, Weights
from tests.kvengine.export_support import (
    TOKENS,
    Float32,
    Tensors,
    engine_logits,
    first_step,
    initializers,
    read_config,
    reference_logits,
    variant,
)

BlockSize = Literal[32, 64, 128]
FLOAT32_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("tiny-gemma3", tmp_path_factory.mktemp("checkpoints") / "tiny-gemma3")


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Float32:
    return reference_logits(tiny, TOKENS)


def difference(found: Float32, sought: Float32) -> float:
    return float(np.abs(found - sought).max())


def rms(found: Float32, sought: Float32) -> float:
    """RMS of the error relative to that of the logits."""
    return float(np.sqrt(np.square(found - sought).mean() / np.square(sought).mean()))


@pytest.mark.parametrize("kind", ["growing", "static", "hybrid"])
def test_float32_logits_equal_transformers(
    tiny: Path, reference: Float32, tmp_path: Path, kind: PlanKind
) -> None:
    artifact = export(tiny, tmp_path / "a", ExportRecipe(cache=CachePlan(kind, slack=2)))
    for chunk in (0, 1, 4, 17):  # one shot, decode, below the window of 5, past it
        assert difference(engine_logits(artifact, TOKENS, chunk), reference) < FLOAT32_TOLERANCE


def test_every_setting_of_the_architecture_shows_in_the_logits(
    tiny: Path, reference: Float32, tmp_path: Path
) -> None:
    """The comparison above can fail: each wrong setting moves logits by > 100x its tolerance."""
    config = read_config(tiny)
    ropes = config["rope_parameters"]
    wrong = {
        "window": {"sliding_window": config["sliding_window"] + 1},
        "scale": {"query_pre_attn_scalar": config["query_pre_attn_scalar"] + 8},
        "eps": {"rms_norm_eps": 1e-2},
        "activation": {"hidden_activation": "silu"},
        "order": {"layer_types": config["layer_types"][::-1]},
        "swapped ropes": {
            "rope_parameters": {
                "sliding_attention": ropes["full_attention"],
                "full_attention": ropes["sliding_attention"],
            }
        },
    }
    for name, change in wrong.items():
        checkpoint = variant(tiny, tmp_path / name, config=config | change)
        artifact = export(checkpoint, tmp_path / f"{name}.out", ExportRecipe())
        assert difference(engine_logits(artifact, TOKENS), reference) > 100 * FLOAT32_TOLERANCE, name


def test_linear_rope_scaling_equals_transformers(tiny: Path, tmp_path: Path) -> None:
    config = read_config(tiny)
    del config["rope_parameters"]
    config |= {
        "rope_theta": 10_000,
        "rope_local_base_freq": 100,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    checkpoint = variant(tiny, tmp_path / "scaled", config=config)
    artifact = export(checkpoint, tmp_path / "a", ExportRecipe())
    expected = reference_logits(checkpoint, TOKENS)
    assert difference(engine_logits(artifact, TOKENS, 4), expected) < FLOAT32_TOLERANCE


def untied(tiny: Path, target: Path) -> Path:
    def add_head(tensors: Tensors) -> Tensors:
        embedding = tensors["model.embed_tokens.weight"]
        head = np.random.default_rng(3).normal(0, embedding.std(), embedding.shape)
        return tensors | {"lm_head.weight": head.astype(np.float32)}

    return variant(tiny, target, config=read_config(tiny) | {"tie_word_embeddings": False}, tensors=add_head)


def test_an_untied_head_is_its_own_matrix(tiny: Path, tmp_path: Path) -> None:
    checkpoint = untied(tiny, tmp_path / "untied")
    artifact = export(checkpoint, tmp_path / "a", ExportRecipe())
    assert not artifact.manifest.spec.tied_head
    expected = reference_logits(checkpoint, TOKENS)
    assert difference(engine_logits(artifact, TOKENS), expected) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_composite_checkpoint_is_exported(
    tiny: Path, reference: Float32, tmp_path: Path, prefix: str
) -> None:
    config = {"model_type": "gemma3", "text_config": read_config(tiny), "vision_config": {}}

    def nest(tensors: Tensors) -> Tensors:
        nested = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
        return nested | {"vision_tower.patch.weight": np.full((2, 2), np.nan, np.float32)}

    checkpoint = variant(tiny, tmp_path / "composite", config=config, tensors=nest)
    artifact = export(checkpoint, tmp_path / "a", ExportRecipe())
    assert artifact.manifest.spec.family == "gemma3_text"
    assert difference(engine_logits(artifact, TOKENS), reference) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_float16_weights_stay_near_float32(
    tiny: Path, reference: Float32, tmp_path: Path, activations: Literal["float32", "float16"]
) -> None:
    cache = CachePlan("hybrid", activations)
    recipe = ExportRecipe(weights="float16", activations=activations, cache=cache)
    artifact = export(tiny, tmp_path / "a", recipe)
    wide = export(tiny, tmp_path / "wide", ExportRecipe())
    assert artifact.manifest.blobs[1].size == pytest.approx(wide.manifest.blobs[1].size / 2, rel=0.01)
    assert rms(engine_logits(artifact, TOKENS, 4), reference) < 0.02


@pytest.mark.parametrize(
    ("weights", "block", "tied"),
    [
        ("int8", 32, True),
        ("int8", 128, False),
        ("int4", 32, False),
        ("int4", 64, True),
        ("int4", 128, True),  # pads the hidden size of 64
    ],
)
def test_a_quantized_graph_computes_with_its_own_weights(
    tiny: Path, tmp_path: Path, weights: Weights, block: BlockSize, tied: bool
) -> None:
    """Dequantized weights are within half a scale, and transformers running them gives our logits."""
    checkpoint = tiny if tied else untied(tiny, tmp_path / "untied")
    artifact = export(checkpoint, tmp_path / "a", ExportRecipe(weights=weights, block_size=block))
    stored = initializers(artifact)
    bits = 4 if weights == "int4" else 8

    def round_all(tensors: Tensors) -> Tensors:
        kept = dict(tensors)
        for name, members in fused(tensors).items():
            original = np.concatenate([tensors[member] for member in members])
            codes = stored.get(f"{name}.codes", stored["embedding.rows"])
            codes = codes.reshape(len(original), -1, block * bits // 8)
            scales = stored[f"{name}.scales"]
            rounded = dequantize_rows(codes, scales, bits, original.shape[1])
            half = np.abs(np.repeat(scales, block, axis=1))[:, : original.shape[1]] / 2
            assert (np.abs(rounded - original) <= half * (1 + 1e-3)).all(), name
            ends = np.cumsum([len(tensors[member]) for member in members])[:-1]
            kept |= dict(zip(members, np.split(rounded, ends), strict=True))
        return kept

    expected = reference_logits(variant(checkpoint, tmp_path / "rounded", tensors=round_all), TOKENS)
    assert difference(run_exactly(artifact), expected) < FLOAT32_TOLERANCE
    # As shipped, accuracy_level 4 also rounds activations to 8 bits.
    assert rms(engine_logits(artifact, TOKENS, 4), expected) < 0.2


def run_exactly(artifact: Artifact) -> Float32:
    """The artifact's logits, but with activations left in float32 inside MatMulNBits."""
    model = onnx.load(artifact.model_path, load_external_data=False)
    levels = [a for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert {level.i for level in levels} == {4}
    for level in levels:
        level.i = 1
    path = artifact.folder / "exact.onnx"
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = first_step(artifact.manifest.spec, np.array([TOKENS]), rows_of_cache=64)
    logits: Float32 = session.run(["logits"], feeds | {"logits_index": np.arange(len(TOKENS))})[0]
    return logits


def fused(tensors: Tensors) -> dict[str, list[str]]:
    """Which checkpoint tensors each matrix of the graph is made of."""
    groups: dict[str, list[str]] = {"embedding": ["model.embed_tokens.weight"]}
    if "lm_head.weight" in tensors:
        groups["head"] = ["lm_head.weight"]
    for i in range(sum(name.endswith("o_proj.weight") for name in tensors)):
        at = f"model.layers.{i}."
        members = {
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "out": ("self_attn.o_proj",),
            "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
            "down": ("mlp.down_proj",),
        }
        for name, parts in members.items():
            groups[f"layers.{i}.{name}"] = [f"{at}{part}.weight" for part in parts]
    return groups


@pytest.mark.parametrize("weights", ["float32", "float16", "int8", "int4"])
def test_a_tied_head_shares_the_embedding_bytes(tiny: Path, tmp_path: Path, weights: Weights) -> None:
    artifact = export(tiny, tmp_path / "a", ExportRecipe(weights=weights))
    graph = onnx.load(artifact.model_path, load_external_data=False).graph
    used = {node.op_type: set(node.input) for node in graph.node if "input_ids" in node.input}
    places: dict[str, set[str]] = {}
    for tensor in graph.initializer:
        offset = [entry.value for entry in tensor.external_data if entry.key == "offset"]
        if tensor.name.startswith("embedding"):
            places.setdefault("".join(offset), set()).add(tensor.name)
    assert len(used) == 1
    if weights in ("int8", "int4"):
        assert {"embedding.rows", "embedding.scales"} <= used["GatherBlockQuantized"]
        assert {"embedding.rows", "embedding.codes"} in places.values()
    else:
        assert "embedding" in used["Gather"]
    assert "head" not in {tensor.name for tensor in graph.initializer}
    spec, width = artifact.manifest.spec, {"float32": 4, "float16": 2, "int8": 1.125, "int4": 0.625}
    everything = spec.vocab_size * spec.hidden_size + sum(
        (2 * spec.num_heads + 2 * layer.kv_heads) * layer.head_dim * spec.hidden_size
        + 3 * spec.hidden_size * spec.intermediate_size
        for layer in spec.layers
    )
    padding = 64 * len(graph.initializer)
    assert artifact.manifest.blobs[1].size <= everything * width[weights] + padding


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.005), ("int8", 0.1), ("int4", 0.9)])
def test_a_narrow_cache_stays_near_float32(
    tiny: Path, reference: Float32, tmp_path: Path, dtype: CacheDtype, tolerance: float
) -> None:
    recipe = ExportRecipe(cache=CachePlan("hybrid", dtype, slack=1))
    artifact = export(tiny, tmp_path / "a", recipe)
    error = rms(engine_logits(artifact, TOKENS, 1), reference)
    assert 1e-6 < error < tolerance


def test_calibration_is_recorded_and_follows_the_sample(tiny: Path, tmp_path: Path) -> None:
    recipe = ExportRecipe(cache=CachePlan("hybrid", "int8"))
    random = export(tiny, tmp_path / "random", recipe)
    given = export(tiny, tmp_path / "given", recipe, calibration_tokens=[5, 6, 7])
    plain = export(tiny, tmp_path / "plain", ExportRecipe(), calibration_tokens=[5, 6, 7])
    assert random.manifest.calibration["sample"].startswith("random")
    assert (given.manifest.calibration["sample"], given.manifest.calibration["sample_tokens"]) == (
        "given",
        "3",
    )
    assert given.manifest.calibration["sample_sha256"] != random.manifest.calibration["sample_sha256"]
    assert plain.manifest.calibration == {}
    assert not list(random.folder.glob("calibration*"))
    few, many = initializers(given), initializers(random)
    for name in ("layers.0.key_scale", "layers.5.value_scale"):
        assert few[name].shape == (1, 2, 1, 32)
        assert (few[name] > 0).all()
        assert few[name].mean() < many[name].mean()


def test_calibration_covers_the_sample_at_every_position(tiny: Path, tmp_path: Path) -> None:
    """No cached value of the sample is out of the codes' reach, whatever its rotation."""
    sample = TOKENS[:4]  # transformers keeps no more in a layer with a window of 5
    recipe = ExportRecipe(cache=CachePlan("static", "int8"))
    scales = initializers(export(tiny, tmp_path / "a", recipe, calibration_tokens=sample))
    config = read_config(tiny)
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        caches = model(torch.tensor([sample]), use_cache=True).past_key_values
    for i in range(config["num_hidden_layers"]):
        keys, values = caches.layers[i].keys.numpy(), caches.layers[i].values.numpy()
        joint = np.hypot(*np.split(keys, 2, axis=3)).max(axis=2)
        assert (np.concatenate([joint, joint], axis=2) < 127 * scales[f"layers.{i}.key_scale"][:, :, 0]).all()
        assert (np.abs(values).max(axis=2) < 127 * scales[f"layers.{i}.value_scale"][:, :, 0]).all()
    used = scales["layers.0.value_scale"][:, :, 0] * 127 / 1.2
    values = np.abs(caches.layers[0].values.numpy()).max(axis=2)
    assert used == pytest.approx(values, rel=1e-3)


@pytest.mark.parametrize(
    ("tokens", "error"), [([], InvalidRequest), ([-1], InvalidToken), ([10**6], InvalidToken)]
)
def test_an_unusable_calibration_sample_is_refused(
    tiny: Path, tmp_path: Path, tokens: list[int], error: type[Exception]
) -> None:
    with pytest.raises(error):
        export(
            tiny, tmp_path / "a", ExportRecipe(cache=CachePlan("static", "int4")), calibration_tokens=tokens
        )
    assert list(tmp_path.iterdir()) == []


def test_activations_that_overflow_float16_are_refused(tiny: Path, tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.v_proj.weight"
    checkpoint = variant(tiny, tmp_path / "loud", tensors=lambda t: t | {name: t[name] * 1e5})
    recipe = ExportRecipe(weights="int8", activations="float16", cache=CachePlan("hybrid", "int8"))
    with pytest.raises(CheckpointError, match=r"layer 2.*float16"):
        export(checkpoint, tmp_path / "a", recipe)


def test_exporting_twice_gives_the_same_artifact(tiny: Path, tmp_path: Path) -> None:
    recipe = ExportRecipe(weights="int4", cache=CachePlan("hybrid", "int8"))
    first, second = (export(tiny, tmp_path / name, recipe) for name in ("first", "second"))
    assert first.id == second.id
    assert export(tiny, tmp_path / "third", ExportRecipe(weights="int8")).id != first.id


def test_the_manifest_tells_what_was_exported(tiny: Path, tmp_path: Path) -> None:
    recipe = ExportRecipe(weights="int8", block_size=64, cache=CachePlan("static", "float16"))
    artifact = export(tiny, tmp_path / "a", recipe)
    reopened = Artifact.open(tmp_path / "a")
    assert reopened.manifest == artifact.manifest
    assert (
        decode(type(artifact.manifest), json.loads(json.dumps(encode(artifact.manifest))))
        == artifact.manifest
    )
    assert reopened.manifest.recipe == recipe
    assert reopened.manifest.checkpoint == "tiny-gemma3"
    assert {blob.name for blob in reopened.manifest.blobs} == {"model.onnx", "model.onnx.data"}
    assert set(reopened.manifest.versions) == {"kvfarm", "onnx", "onnxruntime"}
    extras = {"genai.onnx", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {blob.name for blob in reopened.manifest.extras} == extras
    files = {"artifact.json", "model.onnx", "model.onnx.data", *extras}
    assert {path.name for path in (tmp_path / "a").iterdir()} == files


def test_any_change_of_the_checkpoint_changes_its_identity(tiny: Path, tmp_path: Path) -> None:
    config = read_config(tiny)
    identities = {export(tiny, tmp_path / "a", ExportRecipe()).manifest.checkpoint_sha256}
    padded = variant(tiny, tmp_path / "1", config=config | {"comment": "x"})
    scaled = variant(
        tiny, tmp_path / "2", tensors=lambda t: t | {"model.norm.weight": t["model.norm.weight"] * 2}
    )
    for i, checkpoint in enumerate((padded, scaled)):
        artifact = export(checkpoint, tmp_path / f"out{i}", ExportRecipe())
        identities.add(artifact.manifest.checkpoint_sha256)
    assert len(identities) == 3


def test_progress_is_told_in_order_to_the_end(tiny: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    recipe = ExportRecipe(cache=CachePlan("static", "int8"))
    export(tiny, tmp_path / "a", recipe, progress=lambda *step: told.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == ["weights", "calibration", "identity"]
    for stage in stages:
        steps = [(done, total) for name, done, total in told if name == stage]
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]
        assert all(a[0] < b[0] and a[1] == b[1] for a, b in pairwise(steps))


def test_only_the_rows_asked_for_are_computed(tiny: Path, tmp_path: Path) -> None:
    artifact = export(tiny, tmp_path / "a", ExportRecipe(cache=CachePlan("growing")))
    session = onnxruntime.InferenceSession(str(artifact.model_path), providers=["CPUExecutionProvider"])
    feeds = first_step(artifact.manifest.spec, np.array([TOKENS]))
    everything, greedy = session.run(
        ["logits", "next_token"], feeds | {"logits_index": np.arange(len(TOKENS))}
    )
    some = session.run(["logits", "next_token"], feeds | {"logits_index": np.array([40, 3])})
    assert np.allclose(some[0], everything[[40, 3]], atol=1e-5)
    assert some[1].tolist() == greedy[[40, 3]].tolist() == everything[[40, 3]].argmax(-1)[:, None].tolist()
    none = session.run(["logits", "next_token"], feeds | {"logits_index": np.array([], np.int64)})
    assert (none[0].shape, none[1].shape) == ((0, artifact.manifest.spec.vocab_size), (0, 1))


@pytest.mark.parametrize("vocabulary", [331, 320])  # a prime, and 5 blocks of 64
def test_the_greedy_token_is_the_first_of_the_largest(tiny: Path, tmp_path: Path, vocabulary: int) -> None:
    def twins(tensors: Tensors) -> Tensors:
        embedding = tensors["model.embed_tokens.weight"][:vocabulary].copy()
        embedding[160:318] = embedding[1:159]  # equal rows, equal logits
        return tensors | {"model.embed_tokens.weight": embedding}

    config = read_config(tiny) | {"vocab_size": vocabulary}
    checkpoint = variant(tiny, tmp_path / "twins", config=config, tensors=twins)
    artifact = export(checkpoint, tmp_path / "a", ExportRecipe(cache=CachePlan("growing")))
    session = onnxruntime.InferenceSession(str(artifact.model_path), providers=["CPUExecutionProvider"])
    rows = np.arange(vocabulary)
    feeds = first_step(artifact.manifest.spec, rows[None]) | {"logits_index": rows}
    logits, greedy = session.run(["logits", "next_token"], feeds)
    assert greedy.tolist() == logits.argmax(axis=-1)[:, None].tolist()
    assert len(set(greedy.ravel().tolist())) > 20
    nothing = session.run(["next_token"], feeds | {"logits_index": rows[:0]})[0]
    assert nothing.shape == (0, 1)
    assert (np.sort(logits, axis=-1)[:, -1] == np.sort(logits, axis=-1)[:, -2]).mean() > 0.5


def test_right_padded_rows_of_a_batch_do_not_matter(tiny: Path, reference: Float32, tmp_path: Path) -> None:
    """query_seqlens: a batch of prompts of 41 and 9 tokens, padded with rubbish, in one step."""
    artifact = export(tiny, tmp_path / "a", ExportRecipe(cache=CachePlan("static")))
    spec = artifact.manifest.spec
    session = onnxruntime.InferenceSession(str(artifact.model_path), providers=["CPUExecutionProvider"])
    rows = np.array([TOKENS, TOKENS[:9] + [1] * 32])
    feeds = first_step(spec, rows, rows_of_cache=64)
    lengths = np.array([41, 9], np.int32)
    feeds |= {"query_seqlens": lengths, "seqlens_k": lengths - 1, "logits_index": np.array([40, 41 + 8])}
    logits = session.run(["logits"], feeds)[0]
    assert difference(logits, reference[[40, 8]]) < FLOAT32_TOLERANCE
    # A second padded chunk: row 0 idles and row 1 gets 3 tokens. Without
    # query_seqlens the operator takes a batch with a past one token at a time only.
    present = [f"present.{i}.{part}" for i in range(len(spec.layers)) for part in ("key", "value")]
    caches = session.run(present, feeds)
    again = first_step(spec, np.array([[TOKENS[0], 1, 1], TOKENS[9:12]]), rows_of_cache=64)
    again |= {name.replace("present", "past_key_values"): c for name, c in zip(present, caches, strict=True)}
    again |= {
        f"{n}.{r}": feeds[f"{n}.{r}"] for n in ("cos_cache", "sin_cache") for r in range(len(spec.ropes))
    }
    again |= {
        "query_seqlens": np.array([0, 3], np.int32),
        "seqlens_k": np.array([40, 11], np.int32),
        "total_sequence_length": np.array([41], np.int32),
        "logits_index": np.array([3, 4, 5]),
    }
    assert difference(session.run(["logits"], again)[0], reference[9:12]) < FLOAT32_TOLERANCE


def test_the_recipe_alone_decides_the_window_sized_caches(tiny: Path, tmp_path: Path) -> None:
    for kind in ("growing", "static", "hybrid"):
        artifact = export(tiny, tmp_path / kind, ExportRecipe(cache=CachePlan(kind)))
        nodes = onnx.load(artifact.model_path, load_external_data=False).graph.node
        for layer, node in zip(
            artifact.manifest.spec.layers,
            (node for node in nodes if node.op_type == "GroupQueryAttention"),
            strict=True,
        ):
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes.get("local_window_size") == layer.window
            assert ("sliding_window_cache" in attributes) == artifact.manifest.recipe.cache.is_windowed(layer)


def test_the_spec_survives_json(tiny: Path, tmp_path: Path) -> None:
    spec = export(tiny, tmp_path / "a", ExportRecipe()).manifest.spec
    assert decode(type(spec), json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
