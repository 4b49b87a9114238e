"""What can be synthesised: geometry and scales of each preset, and the tensors that follow from them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Scales:
    """How large activations are; weights follow from these and the geometry.

    Projections have std 1/sqrt(fan_in), so they keep the RMS of what they are given. A family that
    norms Q and K, or the outputs of attention and MLP, gets the scale in those norms' gains; any
    other gets it in the projections themselves.
    """

    embedding: float = 0.15  # RMS of the residual stream at layer 0
    attention: float = 3.0  # std over keys of the scaled attention scores: 0 is uniform, > 2 is peaked
    attention_residual: float = 1.0  # RMS that each attention adds to the residual stream
    mlp_residual: float = 1.0  # RMS that each MLP adds to it
    logits: float = 1.0  # std of the logits over the vocabulary
    norm_spread: float = 0.2  # std of a norm's gain over its channels, relative to the gain
    bias: float = 0.5  # std of a bias, relative to what it is added to


@dataclass(frozen=True)
class Preset:
    """A geometry (``config.json``) and how its weights are scaled."""

    name: str
    config: dict[str, Any]
    scales: Scales = field(default_factory=Scales)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the weights or the config, except the seed."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def head_dim(self) -> int:
        c = self.config
        return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


@dataclass(frozen=True)
class Tensor:
    """One tensor to draw: normal with this mean and std."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Style:
    """What of a family shows in the names, shapes or scales of its tensors."""

    gemma: bool = False  # norms multiply by 1 + weight, embeddings by sqrt(hidden_size)
    sandwich: bool = False  # the outputs of attention and MLP are normed too
    qk_norm: bool = False
    bias: bool = False  # of Q, K and V
    fused: bool = False  # Q, K and V are one tensor, gate and up another


_STYLES: dict[str, _Style] = {
    "gemma2": _Style(gemma=True, sandwich=True),
    "gemma3_text": _Style(gemma=True, sandwich=True, qk_norm=True),
    "llama": _Style(),
    "mistral": _Style(),
    "phi3": _Style(fused=True),
    "qwen2": _Style(bias=True),
    "qwen3": _Style(qk_norm=True),
    "smollm3": _Style(),
}
# RMS of act(gate) * up for gate and up of RMS 1, act being SiLU.
_GATED_RMS = 0.6


def tensors(preset: Preset) -> Iterator[Tensor]:
    """Every tensor of the checkpoint under its Hugging Face name, in file order."""
    c, s, style = preset.config, preset.scales, _STYLES[preset.config["model_type"]]
    hidden, head_dim = c["hidden_size"], preset.head_dim
    width = s.embedding * (hidden**-0.5 if style.gemma else 1.0)
    yield Tensor("model.embed_tokens.weight", (c["vocab_size"], hidden), 0.0, width)
    for index in range(c["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield _norm(preset, f"{layer}.input_layernorm", hidden, 1.0)
        yield from _attention(preset, f"{layer}.self_attn", head_dim)
        if style.sandwich:
            yield _norm(preset, f"{layer}.post_attention_layernorm", hidden, s.attention_residual)
            yield _norm(preset, f"{layer}.pre_feedforward_layernorm", hidden, 1.0)
        else:
            yield _norm(preset, f"{layer}.post_attention_layernorm", hidden, 1.0)
        yield from _mlp(preset, f"{layer}.mlp")
        if style.sandwich:
            yield _norm(preset, f"{layer}.post_feedforward_layernorm", hidden, s.mlp_residual)
    # What the head's rows, which are the embedding's if they are tied, make of an RMS of 1.
    head = width * math.sqrt(hidden) if c["tie_word_embeddings"] else 1.0
    yield _norm(preset, "model.norm", hidden, s.logits / head)
    if not c["tie_word_embeddings"]:
        yield _linear("lm_head", c["vocab_size"], hidden)


def _attention(preset: Preset, at: str, head_dim: int) -> Iterator[Tensor]:
    c, s, style = preset.config, preset.scales, _STYLES[preset.config["model_type"]]
    hidden = c["hidden_size"]
    q_size, kv_size = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    # q and k of RMS g give q.k of std g^2 sqrt(head_dim), then scaled by scalar^-0.5.
    scalar = c.get("query_pre_attn_scalar") or head_dim
    gain = math.sqrt(s.attention * math.sqrt(scalar / head_dim))
    drawn = 1.0 if style.qk_norm else gain
    if style.fused:
        # One std for all three; V's share is taken back in o_proj.
        yield _linear(f"{at}.qkv_proj", q_size + 2 * kv_size, hidden, drawn)
    else:
        for name, rows, scale in (("q", q_size, drawn), ("k", kv_size, drawn), ("v", kv_size, 1.0)):
            yield _linear(f"{at}.{name}_proj", rows, hidden, scale)
            if style.bias:
                yield Tensor(f"{at}.{name}_proj.bias", (rows,), 0.0, s.bias * scale)
    if style.qk_norm:
        yield _norm(preset, f"{at}.q_norm", head_dim, gain)
        yield _norm(preset, f"{at}.k_norm", head_dim, gain)
    wanted = 1.0 if style.sandwich else s.attention_residual / (drawn if style.fused else 1.0)
    yield _linear(f"{at}.o_proj", hidden, q_size, wanted)


def _mlp(preset: Preset, at: str) -> Iterator[Tensor]:
    c, s, style = preset.config, preset.scales, _STYLES[preset.config["model_type"]]
    hidden, ffn = c["hidden_size"], c["intermediate_size"]
    if style.fused:
        yield _linear(f"{at}.gate_up_proj", 2 * ffn, hidden)
    else:
        yield _linear(f"{at}.gate_proj", ffn, hidden)
        yield _linear(f"{at}.up_proj", ffn, hidden)
    yield _linear(f"{at}.down_proj", hidden, ffn, 1.0 if style.sandwich else s.mlp_residual / _GATED_RMS)


def _norm(preset: Preset, name: str, size: int, gain: float) -> Tensor:
    offset = 1.0 if _STYLES[preset.config["model_type"]].gemma else 0.0
    return Tensor(f"{name}.weight", (size,), gain - offset, preset.scales.norm_spread * gain)


def _linear(name: str, rows: int, columns: int, scale: float = 1.0) -> Tensor:
    return Tensor(f"{name}.weight", (rows, columns), 0.0, scale * columns**-0.5)


def parameter_count(preset: Preset) -> int:
    """Weights in the checkpoint; a tied head is stored, and counted, once."""
    return sum(tensor.size for tensor in tensors(preset))


def _layer_types(layers: int, period: int) -> list[str]:
    """Local first: every ``period``-th layer is global."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]


_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GEMMA: dict[str, Any] = _COMMON | {"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA3: dict[str, Any] = _GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}

# The transformers 5 spelling of RoPE. query_pre_attn_scalar differs from head_dim, as in Gemma 3 27B,
# so that an exporter that scales by head_dim is caught; the vocabulary is no multiple of 32.
_TINY_GEMMA3 = Preset(
    name="tiny-gemma3",
    config=_GEMMA3
    | {
        "dtype": "float32",
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
        "layer_types": _layer_types(6, 3),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
)

# The transformers 4 spelling of RoPE and layer types, as google/gemma-3-1b-it has it.
_GEMMA3_1B = Preset(
    name="gemma-3-1b",
    config=_GEMMA3
    | {
        "torch_dtype": "bfloat16",
        "vocab_size": 262_144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10_000,
        "rope_theta": 1_000_000,
        "rope_scaling": None,
    },
    scales=Scales(attention=2.0),
    dtype="bfloat16",
)

_TINY: dict[str, Any] = _COMMON | {
    "dtype": "float32",
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
}
# Bases and original contexts are small, so that 40 tokens already turn what a long text turns.
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000.0}

_FAMILIES = (
    # Llama 3's scaling: of 16 frequencies, 4 stay, 7 are blended and 5 divided.
    Preset(
        "tiny-llama",
        _TINY
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "head_dim": 32,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    # Every layer slides, in the spelling of transformers 4; three query heads on a KV head.
    Preset(
        "tiny-mistral",
        _TINY
        | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": 96,
            "num_attention_heads": 6,
            "head_dim": 16,
            "tie_word_embeddings": False,
            "sliding_window": 5,
            "rope_theta": 1000.0,
        },
    ),
    # Biases, and layers that slide from the third on.
    Preset(
        "tiny-qwen2",
        _TINY
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "tie_word_embeddings": False,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
            "rope_parameters": _ROPE,
        },
    ),
    # YaRN, as Qwen 3's model card has it for long texts.
    Preset(
        "tiny-qwen3",
        _TINY
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "head_dim": 32,
            "attention_bias": False,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": _layer_types(4, 2),
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "beta_fast": 8.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    # Both softcaps are low enough to bend most scores and logits.
    Preset(
        "tiny-gemma2",
        _TINY
        | _GEMMA
        | {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 5,
            "layer_types": _layer_types(4, 2),
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 2.0,
            "rope_parameters": _ROPE,
        },
        Scales(attention=4.0, logits=1.5),
    ),
    # Fused projections, LongRoPE on half of each head, a window.
    Preset(
        "tiny-phi3",
        _TINY
        | {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_size": 128,
            "tie_word_embeddings": False,
            "sliding_window": 5,
            "original_max_position_embeddings": 256,
            "partial_rotary_factor": 0.5,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "rope_theta": 1000.0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 0.5 * i for i in range(8)],
            },
        },
    ),
    # SmolLM and SmolLM2 are Llamas with nine heads on three.
    Preset(
        "tiny-smollm",
        _TINY
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 144,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 1000.0,
        },
    ),
    # Every second layer has no rotary embedding.
    Preset(
        "tiny-smollm3",
        _TINY
        | {
            "architectures": ["SmolLM3ForCausalLM"],
            "model_type": "smollm3",
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_size": 128,
            "no_rope_layer_interval": 2,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": False,
            "sliding_window": None,
            "rope_parameters": _ROPE,
        },
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (_TINY_GEMMA3, *_FAMILIES, _GEMMA3_1B)}
