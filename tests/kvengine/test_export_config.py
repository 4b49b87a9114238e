"""config.json becomes a ModelSpec, in every spelling transformers has used, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvengine.errors import CheckpointError, UnsupportedModel
from kvengine.export import load_spec
from kvengine.export.config import read_architecture
from kvengine.spec import RopeSpec

GEOMETRY: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "max_position_embeddings": 1024,
    "sliding_window": 5,
    "rms_norm_eps": 1e-5,
}
LOCAL, FULL = "sliding_attention", "full_attention"
PATTERN = [LOCAL, LOCAL, FULL, LOCAL, LOCAL, FULL]
NEW = GEOMETRY | {
    "layer_types": PATTERN,
    "rope_parameters": {
        LOCAL: {"rope_type": "default", "rope_theta": 100.0},
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0},
    },
}
OLD = GEOMETRY | {
    "sliding_window_pattern": 3,
    "rope_theta": 10_000,
    "rope_local_base_freq": 100,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
OLDER = OLD | {"rope_scaling": {"type": "linear", "factor": 8}}


def test_the_geometry_is_read() -> None:
    spec = load_spec(NEW)
    assert spec.family == "gemma3_text"
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size) == (331, 64, 160)
    assert (spec.num_heads, spec.max_position, spec.norm_eps) == (4, 1024, 1e-5)
    assert spec.attention_scale == pytest.approx(24**-0.5)
    assert [layer.window for layer in spec.layers] == [5, 5, None, 5, 5, None]
    assert {(layer.kv_heads, layer.head_dim) for layer in spec.layers} == {(2, 32)}
    assert [spec.ropes[layer.rope or 0] for layer in spec.layers[1:3]] == [
        RopeSpec(100.0),
        RopeSpec(10_000.0, factor=8.0),
    ]


@pytest.mark.parametrize("spelling", [OLD, OLDER, OLD | {"layer_types": PATTERN}])
def test_spellings_of_transformers_4_and_5_give_the_same_spec(spelling: dict[str, Any]) -> None:
    assert load_spec(spelling) == load_spec(NEW)


@pytest.mark.parametrize("config", [NEW, OLD, {"model_type": "gemma3_text"}])
def test_transformers_reads_the_same(config: dict[str, Any]) -> None:
    from transformers import Gemma3TextConfig

    theirs = Gemma3TextConfig(**json.loads(json.dumps(config)))
    spec = load_spec(config)
    assert len(spec.layers) == theirs.num_hidden_layers
    assert spec.vocab_size == theirs.vocab_size
    assert spec.tied_head == theirs.tie_word_embeddings
    assert spec.eos_tokens == (theirs.eos_token_id,)
    for layer, kind in zip(spec.layers, theirs.layer_types, strict=True):
        rope = theirs.rope_parameters[kind]
        assert layer.window == (theirs.sliding_window if kind == LOCAL else None)
        assert layer.rope is not None
        assert spec.ropes[layer.rope] == RopeSpec(rope["rope_theta"], rope.get("factor", 1.0))
        assert layer.head_dim == theirs.head_dim


def test_a_composite_checkpoint_relies_on_defaults() -> None:
    """The text_config of google/gemma-3-4b-it names only what differs from transformers' defaults."""
    spec = load_spec(
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"model_type": "siglip_vision_model"},
        }
    )
    assert (spec.num_heads, spec.vocab_size, spec.eos_tokens) == (8, 262_208, (1, 106))
    assert sum(layer.window is None for layer in spec.layers) == 5
    assert spec.ropes == (RopeSpec(10_000.0), RopeSpec(1_000_000.0, factor=8.0))


def test_a_family_without_windows_ignores_a_stray_window() -> None:
    spec = load_spec(GEOMETRY | {"model_type": "llama"})
    assert {layer.window for layer in spec.layers} == {None}


def test_layers_that_rotate_alike_share_one_table() -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    spec = load_spec(NEW | {"rope_parameters": {LOCAL: rope, FULL: rope}})
    assert spec.ropes == (RopeSpec(500.0),)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "gemma3_text"]),
        ({"model_type": None}, ["None", "gemma3_text"]),
        ({"rope_parameters": {FULL: {"rope_type": "dynamic", "rope_theta": 1.0}}}, ["'dynamic'", "linear"]),
        ({"rope_parameters": {FULL: {"rope_type": "linear", "rope_theta": 1.0}}}, ["factor"]),
        ({"rope_parameters": {FULL: {"partial_rotary_factor": 0.5}}}, ["partial_rotary_factor"]),
        ({"layer_types": [*PATTERN[:5], "chunked_attention"]}, ["'chunked_attention'", FULL]),
        ({"layer_types": PATTERN[:5]}, ["6", "5"]),
        ({"sliding_window": 0}, ["sliding_window", "0"]),
        ({"sliding_window": 1025}, ["sliding_window 1025", "1024"]),
        ({"model_type": "llama", "final_logit_softcapping": 30.0}, ["final_logit_softcapping=30.0"]),
        ({"model_type": "llama", "attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0"]),
        ({"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"hidden_activation": "relu"}, ["'relu'", "gelu_pytorch_tanh"]),
        ({"num_key_value_heads": 3}, ["3 KV heads"]),
        ({"head_dim": 24}, ["head_dim 24", "16"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
    ],
)
def test_what_the_exporter_cannot_do_is_refused_by_name(change: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        load_spec(NEW | change)
    for word in named:
        assert word in str(refusal.value)


NOPE = {"model_type": "smollm3", "use_sliding_window": True}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eos_token_id": 331}, ["eos_token_id", "331", "vocab_size"]),
        ({"eos_token_id": [1, "2"]}, ["eos_token_id"]),
        ({"head_dim": None, "hidden_size": 66}, ["66", "no multiple", "4"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"num_hidden_layers": 10**9, "layer_types": None}, ["num_hidden_layers", "4096"]),
        ({"vocab_size": True}, ["vocab_size", "True"]),
        ({"hidden_size": 10**400}, ["hidden_size"]),
        ({"model_type": "qwen3", "use_sliding_window": False}, ["sliding_attention", "use_sliding_window"]),
        (
            {"model_type": "smollm3", "use_sliding_window": True, "no_rope_layers": [1, 0]},
            ["6 zeros and ones"],
        ),
        (
            {"model_type": "smollm3", "use_sliding_window": True, "no_rope_layers": [2] * 6},
            ["zeros and ones"],
        ),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(change: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        load_spec(NEW | {"rope_parameters": {"rope_theta": 100.0}} | change)
    for word in named:
        assert word in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_phi_3s_window_beyond_its_context_is_none() -> None:
    """microsoft/Phi-3-mini-128k-instruct: a window of 262,144 tokens in a context of 131,072."""
    phi = GEOMETRY | {"model_type": "phi3", "rope_theta": 1e4, "sliding_window": 1024}
    assert {layer.window for layer in load_spec(phi).layers} == {1024}
    assert {layer.window for layer in load_spec(phi | {"sliding_window": 1025}).layers} == {None}


def test_a_composite_around_another_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="'llama'"):
        load_spec({"model_type": "gemma3", "text_config": {"model_type": "llama"}})
    with pytest.raises(UnsupportedModel, match="text_config"):
        load_spec({"model_type": "gemma3"})


def test_generation_config_has_the_last_word_on_end_of_sequence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NEW | {"eos_token_id": 1}))
    assert read_architecture(tmp_path).spec.eos_tokens == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    assert read_architecture(tmp_path).spec.eos_tokens == (1, 106)


@pytest.mark.parametrize(("content", "said"), [(None, "found none"), ("{", "not readable"), ("[]", "list")])
def test_a_folder_without_a_readable_config_is_no_checkpoint(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        read_architecture(tmp_path)
