"""``config.json`` to a ModelSpec. Needs no weights, so memory can be estimated from the config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from kvengine.errors import CheckpointError, UnsupportedModel
from kvengine.export.families import ACTIVATIONS, COMPOSITES, FAMILIES, FULL, SLIDING, Family
from kvengine.export.rope_config import original_context, read_rope
from kvengine.export.settings import Settings, read_json, shown
from kvengine.export.unknown import unknown_family
from kvengine.export.weights import Checkpoint
from kvengine.spec import LayerSpec, ModelSpec

Config = Mapping[str, Any]
# onnxruntime's GroupQueryAttention rotates whole vectors of 16 only.
_HEAD_DIM_MULTIPLE = 16
_MOST_LAYERS = 4096
_MOST_POSITIONS = 2**31 - 1  # lengths are int32 in the graph

# Settings that change the arithmetic in ways the graph does not express: key -> values that are fine.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_bidirectional_attention": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class Architecture:
    """A ModelSpec and what else the graph needs to know.

    softcap: attention scores s become ``softcap * tanh(s / softcap)``; 0 is none. logit_softcap: the logits.
    """

    spec: ModelSpec
    family: Family
    activation: Literal["gelu_tanh", "gelu", "silu"]
    softcap: float = 0.0
    logit_softcap: float = 0.0


def load_spec(config: Config) -> ModelSpec:
    """The geometry that a parsed ``config.json`` describes.

    Raises:
        UnsupportedModel: an unknown architecture, RoPE type or setting, a missing key or a contradiction.
    """
    return load_architecture(config).spec


def read_architecture(checkpoint: Path) -> Architecture:
    """As ``load_architecture``, from a checkpoint folder.

    ``generation_config.json`` has the last word on end-of-sequence tokens, as in transformers.

    Raises:
        CheckpointError: no readable ``config.json``.
        UnsupportedModel: as ``load_spec``.
    """
    config = read_json(checkpoint / "config.json")
    if not _is_known(config.get("model_type")):
        raise UnsupportedModel(unknown_family(config, _tensor_names(checkpoint)))
    architecture = load_architecture(config)
    generation = checkpoint / "generation_config.json"
    if generation.is_file():
        settings = Settings(read_json(generation), "generation_config")
        eos = settings.tokens("eos_token_id", architecture.spec.vocab_size)
        if eos:
            architecture = replace(architecture, spec=replace(architecture.spec, eos_tokens=eos))
    return architecture


def load_architecture(config: Config) -> Architecture:
    """The architecture of a parsed ``config.json``; raises as ``load_spec``."""
    model_type, family, text = _text_config(config)
    refused = _REFUSED if family.softcaps else _REFUSED | dict.fromkeys(_SOFTCAPS, (None,))
    for key, fine in refused.items():
        if text.get(key) not in fine:
            raise UnsupportedModel(
                f"{model_type} with {key}={shown(text.get(key))}; supported: {' or '.join(map(repr, fine))}"
            )
    heads, kv_heads, head_dim = _heads(text)
    positions = text.integer("max_position_embeddings", _MOST_POSITIONS)
    types = _layer_types(text, family)
    window = _window(text, family, positions) if SLIDING in types else None
    rotated = _rotated(text, family, len(types))
    ropes = {
        kind: read_rope(text, family, kind, head_dim)
        for kind in dict.fromkeys(kind for kind, turns in zip(types, rotated, strict=True) if turns)
    }
    distinct = tuple(dict.fromkeys(ropes.values()))
    vocabulary = text.integer("vocab_size")
    scalar = text.number("query_pre_attn_scalar") if "query_pre_attn_scalar" in text else float(head_dim)
    spec = ModelSpec(
        family=model_type,
        vocab_size=vocabulary,
        hidden_size=text.integer("hidden_size"),
        intermediate_size=text.integer("intermediate_size"),
        num_heads=heads,
        max_position=min(positions, original_context(text, family) or positions),
        attention_scale=scalar**-0.5,
        norm_eps=text.number("rms_norm_eps"),
        tied_head=text.flag("tie_word_embeddings"),
        layers=tuple(
            LayerSpec(
                window=window if kind == SLIDING else None,
                rope=distinct.index(ropes[kind]) if turns else None,
                kv_heads=kv_heads,
                head_dim=head_dim,
            )
            for kind, turns in zip(types, rotated, strict=True)
        ),
        ropes=distinct,
        eos_tokens=text.tokens("eos_token_id", vocabulary),
    )
    caps = [text.number(key) if key in text else 0.0 for key in _SOFTCAPS]
    return Architecture(spec, family, _activation(text), *caps)


def _is_known(model_type: object) -> TypeGuard[str]:
    return isinstance(model_type, str) and model_type in {*FAMILIES, *COMPOSITES}


def _tensor_names(checkpoint: Path) -> list[str]:
    """None of a checkpoint that cannot be read: its config is refused anyway."""
    try:
        with Checkpoint(checkpoint) as tensors:
            return tensors.names()
    except CheckpointError:
        return []


def _text_config(config: Config) -> tuple[str, Family, Settings]:
    """model_type and settings of the language model, with the family's defaults filled in."""
    outer: Config = config
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in COMPOSITES:
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            raise UnsupportedModel(f"{model_type}: sought an object text_config, found {shown(inner)}")
        config = inner
        model_type = COMPOSITES[model_type]
        if config.get("model_type", model_type) != model_type:
            raise UnsupportedModel(
                f"{outer['model_type']} around {shown(config['model_type'])}; supported: {model_type}"
            )
    if not _is_known(model_type):
        raise UnsupportedModel(unknown_family(config))
    family = FAMILIES[model_type]
    text = {**family.defaults, **config}
    if outer is not config:
        for key in ("tie_word_embeddings", "eos_token_id", "quantization_config"):
            if outer.get(key) is not None:
                text[key] = outer[key]
    return model_type, family, Settings(text)


def _heads(text: Settings) -> tuple[int, int, int]:
    """Query heads, KV heads and head_dim."""
    heads, hidden = text.integer("num_attention_heads"), text.integer("hidden_size")
    kv_heads = text.integer("num_key_value_heads") if "num_key_value_heads" in text else heads
    if "head_dim" not in text and hidden % heads:
        raise UnsupportedModel(
            f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim"
        )
    head_dim = text.integer("head_dim") if "head_dim" in text else hidden // heads
    if heads % kv_heads or head_dim % _HEAD_DIM_MULTIPLE:
        raise UnsupportedModel(
            f"{heads} query heads on {kv_heads} KV heads with head_dim {head_dim}; supported: query "
            f"heads a multiple of KV heads, head_dim a multiple of {_HEAD_DIM_MULTIPLE}"
        )
    return heads, kv_heads, head_dim


def _window(text: Settings, family: Family, positions: int) -> int | None:
    """Tokens; None where it never slides and the family is known for that."""
    window = text.integer("sliding_window", _MOST_POSITIONS)
    if window <= positions:
        return window
    if family.idle_window:
        return None
    raise UnsupportedModel(
        f"sliding_window {window} is beyond the context of {positions} tokens (max_position_embeddings); "
        "one of the two is wrong"
    )


def _rotated(text: Settings, family: Family, count: int) -> tuple[bool, ...]:
    """Of each layer, whether Q and K are rotated."""
    if not family.unrotated:
        return (True,) * count
    if "no_rope_layers" in text:  # in spite of its name, a one is a layer that does rotate
        return text.flags("no_rope_layers", count)
    period = text.integer("no_rope_layer_interval")
    return tuple((i + 1) % period != 0 for i in range(count))


def _layer_types(text: Settings, family: Family) -> tuple[str, ...]:
    """One of FULL or SLIDING per layer, from ``layer_types`` or the older pattern keys."""
    count = text.integer("num_hidden_layers", _MOST_LAYERS)
    if "layer_types" in text and family.pattern in ("every", "tail", "unrotated"):
        listed = text.strings("layer_types")
        unknown = [kind for kind in listed if kind not in (FULL, SLIDING)]
        if unknown:
            raise UnsupportedModel(f"layer type {shown(unknown[0])}; supported: {FULL}, {SLIDING}")
        if len(listed) != count:
            raise UnsupportedModel(f"sought {count} layer_types (num_hidden_layers), found {len(listed)}")
        if SLIDING in listed and family.pattern != "every" and not text.flag("use_sliding_window"):
            raise UnsupportedModel(f"layer_types has {SLIDING}, but use_sliding_window is false")
        return listed
    if text.get("sliding_window") is None:
        return (FULL,) * count
    match family.pattern:
        case "none":
            slides = (False,) * count
        case "all":
            slides = (True,) * count
        case "every":
            period = text.integer("sliding_window_pattern")
            slides = tuple((i + 1) % period != 0 for i in range(count))
        case "tail":
            first = text.integer("max_window_layers") if text.get("max_window_layers") else 0
            slides = tuple(text.flag("use_sliding_window") and i >= first for i in range(count))
        case "unrotated":
            turns = _rotated(text, family, count)
            slides = tuple(text.flag("use_sliding_window") and not turn for turn in turns)
    return tuple(SLIDING if slide else FULL for slide in slides)


def _activation(text: Settings) -> Literal["gelu_tanh", "gelu", "silu"]:
    name = text.get("hidden_activation") or text.get("hidden_act")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {shown(name)}; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
