"""The rotary part of ``config.json``, in every spelling transformers has used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kvengine.errors import UnsupportedModel
from kvengine.export.families import SLIDING, Family
from kvengine.export.settings import Settings, shown
from kvengine.spec import Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling

TYPES = ("default", "linear", "llama3", "yarn", "longrope")
# onnxruntime's GroupQueryAttention rotates whole vectors of 16 only.
_ROTARY_MULTIPLE = 16


def read_rope(text: Settings, family: Family, kind: str, head_dim: int) -> RopeSpec:
    """The rotary table of layers of this kind (FULL or SLIDING).

    transformers 5: ``rope_parameters``, one object or one per layer type. 4.x: ``rope_theta``,
    ``rope_local_base_freq`` and ``rope_scaling``.

    Raises:
        UnsupportedModel: an unknown RoPE type, or a setting that is missing or makes no sense.
    """
    settings = _settings(text, family, kind)
    rope_type = settings.get("rope_type") or settings.get("type") or "default"
    rope_type = family.rope_aliases.get(rope_type, rope_type) if isinstance(rope_type, str) else rope_type
    if rope_type not in TYPES:
        raise UnsupportedModel(
            f"RoPE type {shown(rope_type)} in {kind} layers; supported: {', '.join(TYPES)}"
            + (
                " (dynamic scaling rotates every cached key anew as the sequence grows)"
                if rope_type == "dynamic"
                else ""
            )
        )
    theta = settings.number("rope_theta")
    width = _rotary_dim(settings, family, kind, head_dim)
    rotary_dim = None if width == head_dim else width
    match rope_type:
        case "linear":
            return RopeSpec(theta, settings.number("factor"), rotary_dim)
        case "llama3":
            return RopeSpec(theta, 1.0, rotary_dim, scaling=_llama3(text, settings))
        case "yarn":
            return _yarn(text, settings, theta, rotary_dim)
        case "longrope":
            factors = settings.numbers("short_factor", width // 2)
            scaling = LongRopeScaling(factors)
            return RopeSpec(theta, 1.0, rotary_dim, _longrope_magnitude(text, settings), scaling)
        case _:
            return RopeSpec(theta, 1.0, rotary_dim)


def original_context(text: Settings, family: Family) -> int | None:
    """Tokens up to which a LongRoPE model uses its short factors; None for every other model.

    transformers rotates the whole sequence by the long factors as soon as it is longer. A cache
    would then hold keys of both kinds (microsoft/onnxruntime-genai#1161), so the engine stops there.
    """
    settings = _settings(text, family, "")
    rope_type = settings.get("rope_type") or settings.get("type")
    if not isinstance(rope_type, str) or family.rope_aliases.get(rope_type, rope_type) != "longrope":
        return None
    return _original(text, settings)


def _settings(text: Settings, family: Family, kind: str) -> Settings:
    """What concerns layers of this kind, whatever the spelling, as one object."""
    local = kind == SLIDING and "rope_local_base_freq" in text
    theta = text.get("rope_local_base_freq" if local else "rope_theta")
    found: dict[str, Any] = {
        "rope_theta": theta,
        "partial_rotary_factor": text.get("partial_rotary_factor"),
    }
    parameters = text.within("rope_parameters")
    if any(isinstance(value, Mapping) for value in parameters.items().values()):
        parameters = parameters.within(kind)
    found.update(parameters.items())
    if not (local and family.global_scaling):
        found.update(text.within("rope_scaling").items())
    return Settings(found, "rope_parameters")


def _rotary_dim(settings: Settings, family: Family, kind: str, head_dim: int) -> int:
    share = settings.number("partial_rotary_factor") if "partial_rotary_factor" in settings else 1.0
    if share == 1.0:
        return head_dim
    width = int(head_dim * share)
    if not family.partial_rotary or share > 1.0 or width == 0 or width % _ROTARY_MULTIPLE:
        raise UnsupportedModel(
            f"partial_rotary_factor {share!r} in {kind} layers of head_dim {head_dim}; supported: 1.0"
            + f", or less with a multiple of {_ROTARY_MULTIPLE} rotating channels" * family.partial_rotary
        )
    return width


def _original(text: Settings, settings: Settings) -> int:
    """Tokens of context before scaling: transformers lets the outer key win over the inner one."""
    for place in (text, settings):
        if "original_max_position_embeddings" in place:
            return place.integer("original_max_position_embeddings", most=2**31 - 1)
    return text.integer("max_position_embeddings", most=2**31 - 1)


def _llama3(text: Settings, settings: Settings) -> Llama3Scaling:
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if not low < high:
        raise UnsupportedModel(f"llama3 RoPE: sought low_freq_factor < high_freq_factor, found {low}, {high}")
    return Llama3Scaling(settings.number("factor"), low, high, _original(text, settings))


def _stretch(text: Settings, settings: Settings) -> float:
    """``factor``, or what max_position_embeddings says of it."""
    if "factor" in settings:
        return settings.number("factor")
    return text.integer("max_position_embeddings", most=2**31 - 1) / _original(text, settings)


def _yarn(text: Settings, settings: Settings, theta: float, rotary_dim: int | None) -> RopeSpec:
    factor = _stretch(text, settings)
    slow = settings.number("beta_slow") if settings.get("beta_slow") else 1.0
    fast = settings.number("beta_fast") if settings.get("beta_fast") else 32.0
    if theta == 1.0 or not slow < fast:
        raise UnsupportedModel(
            f"yarn RoPE: sought a rope_theta other than 1 and beta_slow < beta_fast, found {theta}, {slow} "
            f"and {fast}"
        )
    truncate = settings.flag("truncate") if "truncate" in settings else True
    scaling = YarnScaling(factor, slow, fast, _original(text, settings), truncate)
    return RopeSpec(theta, 1.0, rotary_dim, _yarn_magnitude(settings, factor), scaling)


def _yarn_magnitude(settings: Settings, factor: float) -> float:
    """The attention factor as transformers' ``_compute_yarn_parameters`` infers it."""
    if "attention_factor" in settings:
        return settings.number("attention_factor")

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return scale(settings.number("mscale")) / scale(settings.number("mscale_all_dim"))
    return scale(1.0)


def _longrope_magnitude(text: Settings, settings: Settings) -> float:
    """The attention factor as transformers' ``_compute_longrope_parameters`` infers it."""
    if "attention_factor" in settings:
        return settings.number("attention_factor")
    factor, original = _stretch(text, settings), _original(text, settings)
    if factor <= 1.0:
        return 1.0
    if original == 1:
        raise UnsupportedModel("longrope: sought an original context of more than 1 token, found 1")
    return math.sqrt(1 + math.log(factor) / math.log(original))
