"""The model families the exporter knows: one row each, all built by the same graph code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What sets one Hugging Face ``model_type`` apart from the others.

    defaults: config keys that its ``config.json`` may leave out, as transformers fills them in.
    pattern: which layers slide when ``layer_types`` is absent: ``none``, ``every`` (all but each
        ``sliding_window_pattern``-th), ``all`` (all, if there is a window), ``tail`` (with
        ``use_sliding_window``, the layers from ``max_window_layers`` on) or ``unrotated`` (with
        ``use_sliding_window``, the layers without rotary embedding).
    norm_offset: the RMS norm multiplies by ``norm_offset + weight``.
    scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
    sandwich: the outputs of attention and MLP are normed too, before they are added.
    qk_norm: Q and K are normed per head, before rotation.
    qkv_bias: the Q, K and V projections always have a bias.
    fused: Q, K and V are one tensor in the checkpoint, gate and up another.
    softcaps: ``attn_logit_softcapping`` and ``final_logit_softcapping`` are honoured.
    global_scaling: ``rope_scaling`` (4.x spelling) concerns full-attention layers only.
    partial_rotary: ``partial_rotary_factor`` is honoured.
    rope_aliases: older names of RoPE types.
    unrotated: ``no_rope_layers`` and ``no_rope_layer_interval`` name layers without rotary embedding.
    idle_window: published checkpoints state a window beyond the context. It never slides.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    pattern: Literal["none", "every", "all", "tail", "unrotated"] = "none"
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    sandwich: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    fused: bool = False
    softcaps: bool = False
    global_scaling: bool = False
    partial_rotary: bool = False
    rope_aliases: dict[str, str] = field(default_factory=dict)
    unrotated: bool = False
    idle_window: bool = False


_GEMMA3 = Family(
    # transformers' Gemma3TextConfig; config.json of the composite checkpoints relies on these.
    defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    pattern="every",
    norm_offset=1.0,
    scaled_embedding=True,
    sandwich=True,
    qk_norm=True,
    softcaps=True,
    global_scaling=True,
)

# transformers' Gemma2Config.
_GEMMA2 = Family(
    defaults={
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "rope_theta": 10_000.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    pattern="every",
    norm_offset=1.0,
    scaled_embedding=True,
    sandwich=True,
    softcaps=True,
)

# Published configs always state the geometry; these are the keys that some leave out.
_COMMON: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
_QWEN = _COMMON | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "llama": Family(defaults=_COMMON | {"max_position_embeddings": 2048}),
    "mistral": Family(
        defaults=_COMMON
        | {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
        pattern="all",
    ),
    "phi3": Family(
        defaults=_COMMON
        | {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        pattern="all",
        fused=True,
        partial_rotary=True,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        idle_window=True,
    ),
    "qwen2": Family(defaults=_QWEN | {"max_position_embeddings": 32_768}, pattern="tail", qkv_bias=True),
    "qwen3": Family(
        defaults=_QWEN | {"max_position_embeddings": 32_768, "head_dim": 128}, pattern="tail", qk_norm=True
    ),
    "smollm3": Family(
        defaults=_COMMON
        | {
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        pattern="unrotated",
        unrotated=True,
    ),
}

# Composite checkpoints: model_type -> model_type of the language model in ``text_config``.
COMPOSITES: dict[str, str] = {"gemma3": "gemma3_text"}

# transformers' names of activations -> the graph's.
ACTIVATIONS: dict[str, Literal["gelu_tanh", "gelu", "silu"]] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
}

# Where a language model's weights live: plain, transformers 4.52+ and older composite checkpoints.
WEIGHT_PREFIXES = ("model.", "model.language_model.", "language_model.model.")
HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight")
