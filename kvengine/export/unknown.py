"""What sets a model of an unknown family apart from the nearest one that the exporter knows."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from kvengine.export.families import COMPOSITES, FAMILIES, Family
from kvengine.export.settings import shown

_MOST_NAMED = 8
# Keys that every decoder's config.json may have and that change nothing here.
# fmt: off
_COMMON = frozenset((
    "architectures", "attention_bias", "attention_dropout", "auto_map", "bos_token_id", "dtype", "embd_pdrop",
    "eos_token_id", "head_dim", "hidden_act", "hidden_size", "id2label", "initializer_range",
    "intermediate_size", "label2id", "layer_types", "max_position_embeddings", "mlp_bias", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id", "pretraining_tp",
    "quantization_config", "resid_pdrop", "return_dict", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
    "_name_or_path",
))
# fmt: on
_NEEDED = frozenset(
    {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"}
)
_NORMED = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
_SANDWICH = ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")


def unknown_family(config: Mapping[str, Any], tensors: Collection[str] = ()) -> str:
    """The refusal of a ``config.json`` with an unknown model_type, by config keys and tensor names.

    tensors: every name in the checkpoint, if it is at hand.
    """
    supported = ", ".join(sorted([*FAMILIES, *COMPOSITES]))
    said = f"model_type {shown(config.get('model_type'))} is not supported; supported: {supported}"
    keys = {key for key in config if isinstance(key, str)} - {"text_config", "vision_config"}
    names = {_without_number(name) for name in tensors}
    if not keys & _NEEDED and not names:
        return f"{said}; it has none of a decoder's keys such as hidden_size"
    nearest = max(FAMILIES, key=lambda name: _likeness(FAMILIES[name], keys, names))
    family = FAMILIES[nearest]
    said_of_it = {key for key in keys if config[key]}  # null, false or 0 says what the model has not
    differences = [
        _listed("config keys unknown there", said_of_it - _keys_of(family)),
        _listed("config keys missing", _NEEDED - keys),
    ]
    if names:
        differences += [
            _listed("tensors unknown there", names - _tensors_of(family) - {"lm_head.weight"}),
            _listed("tensors missing", _tensors_of(family) - names),
        ]
    told = "; ".join(filter(None, differences)) or "nothing but its name, as far as keys and tensors tell"
    return f"{said}. Nearest is {nearest}; what differs: {told}"


def _likeness(family: Family, keys: set[str], names: set[str]) -> float:
    """How much of keys and names is shared with the family, 0 to 2."""
    return _overlap(keys, _keys_of(family)) + _overlap(names, _tensors_of(family))


def _overlap(found: set[str], known: set[str]) -> float:
    return len(found & known) / max(1, len(found | known))


def _keys_of(family: Family) -> set[str]:
    optional = {"no_rope_layers", "sliding_window", "use_sliding_window"} if family.unrotated else set()
    optional |= {"partial_rotary_factor"} if family.partial_rotary else set()
    optional |= {"attn_logit_softcapping", "final_logit_softcapping"} if family.softcaps else set()
    optional |= {"sliding_window"} if family.pattern != "none" else set()
    optional |= {"_sliding_window_pattern"} if family.pattern == "every" else set()
    return {*_COMMON, *family.defaults, *optional}


def _tensors_of(family: Family) -> set[str]:
    """Names with ``N`` for the layer's number; the head aside, which may be tied."""
    parts = ["input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight"]
    parts += ["mlp.down_proj.weight"]
    parts += _SANDWICH if family.sandwich else ()
    parts += _NORMED if family.qk_norm else ()
    parts += _BIASES if family.qkv_bias else ()
    if family.fused:
        parts += ["self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"]
    else:
        parts += [f"self_attn.{name}_proj.weight" for name in "qkv"]
        parts += ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    return {"model.embed_tokens.weight", "model.norm.weight", *(f"model.layers.N.{part}" for part in parts)}


def _without_number(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def _listed(what: str, names: Iterable[str]) -> str:
    each = sorted(names)
    if not each:
        return ""
    more = f" and {len(each) - _MOST_NAMED} more" if len(each) > _MOST_NAMED else ""
    return f"{what}: {', '.join(name[:80] for name in each[:_MOST_NAMED])}{more}"
