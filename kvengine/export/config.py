"""``config.json`` to a ModelSpec. Needs no weights, so memory can be estimated from the config alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvengine.errors import CheckpointError, UnsupportedModel
from kvengine.export.families import ACTIVATIONS, COMPOSITES, FAMILIES, FULL, SLIDING, Family
from kvengine.spec import LayerSpec, ModelSpec, RopeSpec

Config = Mapping[str, Any]
# onnxruntime's GroupQueryAttention rotates whole vectors of 16 only.
_HEAD_DIM_MULTIPLE = 16

# Settings that change the arithmetic in ways the graph does not express: key -> values that are fine.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}


@dataclass(frozen=True)
class Architecture:
    """A ModelSpec and what else the graph needs to know."""

    spec: ModelSpec
    family: Family
    activation: Literal["gelu_tanh", "gelu", "silu"]


def load_spec(config: Config) -> ModelSpec:
    """The geometry that a parsed ``config.json`` describes.

    Raises:
        UnsupportedModel: an unknown architecture, RoPE type or setting, or a missing key.
    """
    return load_architecture(config).spec


def read_architecture(checkpoint: Path) -> Architecture:
    """As ``load_architecture``, from a checkpoint folder.

    ``generation_config.json`` has the last word on end-of-sequence tokens, as in transformers.

    Raises:
        CheckpointError: no readable ``config.json``.
        UnsupportedModel: as ``load_spec``.
    """
    architecture = load_architecture(_read_json(checkpoint / "config.json"))
    generation = checkpoint / "generation_config.json"
    if generation.is_file():
        eos = _eos(_read_json(generation))
        if eos:
            architecture = replace(architecture, spec=replace(architecture.spec, eos_tokens=eos))
    return architecture


def load_architecture(config: Config) -> Architecture:
    """The architecture of a parsed ``config.json``; raises as ``load_spec``."""
    model_type, family, text = _text_config(config)
    for key, fine in _REFUSED.items():
        if text.get(key) not in fine:
            raise UnsupportedModel(
                f"{model_type} with {key}={text[key]!r}; supported: {' or '.join(map(repr, fine))}"
            )
    heads = _integer(text, "num_attention_heads")
    hidden = _integer(text, "hidden_size")
    head_dim = _integer(text, "head_dim") if text.get("head_dim") else hidden // heads
    kv_heads = _integer(text, "num_key_value_heads") if text.get("num_key_value_heads") else heads
    if heads % kv_heads or head_dim % _HEAD_DIM_MULTIPLE:
        raise UnsupportedModel(
            f"{heads} query heads on {kv_heads} KV heads with head_dim {head_dim}; supported: query "
            f"heads a multiple of KV heads, head_dim a multiple of {_HEAD_DIM_MULTIPLE}"
        )
    types = _layer_types(text, family)
    ropes = {kind: _rope(text, family, kind) for kind in dict.fromkeys(types)}
    distinct = tuple(dict.fromkeys(ropes.values()))
    window = _integer(text, "sliding_window") if SLIDING in types else None
    scalar = text.get("query_pre_attn_scalar") or head_dim
    spec = ModelSpec(
        family=model_type,
        vocab_size=_integer(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(text, "intermediate_size"),
        num_heads=heads,
        max_position=_integer(text, "max_position_embeddings"),
        attention_scale=float(scalar) ** -0.5,
        norm_eps=_number(text, "rms_norm_eps"),
        tied_head=bool(text.get("tie_word_embeddings", False)),
        layers=tuple(
            LayerSpec(
                window=window if kind == SLIDING else None,
                rope=distinct.index(ropes[kind]),
                kv_heads=kv_heads,
                head_dim=head_dim,
            )
            for kind in types
        ),
        ropes=distinct,
        eos_tokens=_eos(text),
    )
    return Architecture(spec, family, _activation(text))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"sought {path.name} in {path.parent}, found none; a checkpoint is a Hugging Face folder "
            "with config.json and *.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: sought a JSON object, found a {type(value).__name__}")
    return value


def _text_config(config: Config) -> tuple[str, Family, dict[str, Any]]:
    """model_type and settings of the language model, with the family's defaults filled in."""
    outer: Config = config
    model_type = config.get("model_type")
    if model_type in COMPOSITES:
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            raise UnsupportedModel(f"{model_type}: sought an object text_config, found {inner!r}")
        config = inner
        model_type = COMPOSITES[model_type]
        if config.get("model_type", model_type) != model_type:
            raise UnsupportedModel(
                f"{outer['model_type']} around {config['model_type']!r}; supported: {model_type}"
            )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(sorted([*FAMILIES, *COMPOSITES]))
        raise UnsupportedModel(f"model_type {model_type!r} is not supported; supported: {supported}")
    family = FAMILIES[model_type]
    text = {**family.defaults, **config}
    if outer is not config:
        for key in ("tie_word_embeddings", "eos_token_id", "quantization_config"):
            if outer.get(key) is not None:
                text[key] = outer[key]
    return model_type, family, text


def _layer_types(text: Config, family: Family) -> tuple[str, ...]:
    """One of FULL or SLIDING per layer, from ``layer_types`` or the older pattern keys."""
    count = _integer(text, "num_hidden_layers")
    listed = text.get("layer_types")
    if listed is not None:
        unknown = [kind for kind in listed if kind not in (FULL, SLIDING)]
        if unknown:
            raise UnsupportedModel(f"layer type {unknown[0]!r}; supported: {FULL}, {SLIDING}")
        if len(listed) != count:
            raise UnsupportedModel(f"sought {count} layer_types (num_hidden_layers), found {len(listed)}")
        return tuple(listed)
    if family.pattern == "none" or text.get("sliding_window") is None:
        return (FULL,) * count
    if family.pattern == "every":
        period = _integer(text, "sliding_window_pattern")
        return tuple(SLIDING if (i + 1) % period else FULL for i in range(count))
    if family.pattern == "tail":
        first = int(text["max_window_layers"]) if text.get("use_sliding_window") else count
        return tuple(SLIDING if i >= first else FULL for i in range(count))
    return (SLIDING,) * count


def _rope(text: Config, family: Family, kind: str) -> RopeSpec:
    """The rotary table of layers of this kind, from either spelling.

    transformers 5: ``rope_parameters``, one object or one per layer type. 4.x: ``rope_theta``,
    ``rope_local_base_freq`` and ``rope_scaling``.
    """
    local = kind == SLIDING and "rope_local_base_freq" in text
    theta = text.get("rope_local_base_freq" if local else "rope_theta")
    settings: dict[str, Any] = {"rope_theta": theta}
    parameters = text.get("rope_parameters") or {}
    nested = any(isinstance(value, Mapping) for value in parameters.values())
    settings.update((parameters.get(kind) or {}) if nested else parameters)
    if not (local and family.global_scaling):
        settings.update(text.get("rope_scaling") or {})
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise UnsupportedModel(f"RoPE type {rope_type!r} in {kind} layers; supported: default, linear")
    if settings.get("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedModel(
            f"partial_rotary_factor {settings['partial_rotary_factor']!r} in {kind} layers; supported: 1.0"
        )
    factor = _number(settings, "factor") if rope_type == "linear" else 1.0
    return RopeSpec(theta=_number(settings, "rope_theta"), factor=factor)


def _activation(text: Config) -> Literal["gelu_tanh", "gelu", "silu"]:
    name = text.get("hidden_activation") or text.get("hidden_act")
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {name!r}; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _eos(config: Config) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _integer(text: Config, key: str) -> int:
    value = text.get(key)
    if type(value) is not int or value < 1:
        raise UnsupportedModel(f"config key {key}: sought a positive integer, found {value!r}")
    return value


def _number(text: Config, key: str) -> float:
    value = text.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UnsupportedModel(f"config key {key}: sought a positive number, found {value!r}")
    return float(value)
