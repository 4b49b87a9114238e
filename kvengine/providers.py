"""Execution providers by the names people use, with the flags and options each one has."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnxruntime as ort

from kvengine.errors import ProviderUnavailable, RecipeError
from kvengine.recipe import SessionRecipe


@dataclass(frozen=True)
class Provider:
    """flags: name to bit, for providers that take a bit mask. options: None means any key passes."""

    onnxruntime_name: str
    flags: dict[str, int] = field(default_factory=dict)
    options: frozenset[str] | None = frozenset()
    flag_note: str = ""


PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider"),
    "xnnpack": Provider("XnnpackExecutionProvider", options=frozenset({"intra_op_num_threads"})),
    # Bits from onnxruntime's nnapi_provider_factory.h. SUSTAINED_SPEED is an NDK compilation
    # preference that onnxruntime never exposed.
    "nnapi": Provider(
        "NnapiExecutionProvider",
        flags={"USE_FP16": 1, "USE_NCHW": 2, "CPU_DISABLED": 4, "CPU_ONLY": 8},
        flag_note=(
            "onnxruntime's own Python binding creates the NNAPI provider with flags 0 and ignores these; "
            "they act only in a runtime whose binding reads the provider option 'nnapi_flags'"
        ),
    ),
    "qnn": Provider("QNNExecutionProvider", options=None),
    "cuda": Provider("CUDAExecutionProvider", options=None),
}


def validate(recipe: SessionRecipe) -> Provider:
    """The provider a recipe names, after checking its flags and options (not its presence).

    Raises:
        RecipeError: unknown provider, flag or option, listing those there are.
    """
    provider = PROVIDERS.get(recipe.provider)
    if provider is None:
        raise RecipeError(f"unknown provider {recipe.provider!r}; kvfarm knows {sorted(PROVIDERS)}")
    for flag in recipe.provider_flags:
        if flag not in provider.flags:
            known = ", ".join(provider.flags) or "none"
            raise RecipeError(f"provider {recipe.provider!r} has no flag {flag!r}; it has: {known}")
    for option in recipe.provider_options:
        if provider.options is not None and option not in provider.options:
            known = ", ".join(sorted(provider.options)) or "none"
            raise RecipeError(f"provider {recipe.provider!r} has no option {option!r}; it has: {known}")
    return provider


def session_providers(recipe: SessionRecipe) -> list[tuple[str, dict[str, str]]]:
    """The ``providers`` argument of InferenceSession: the one asked for, then the CPU for what it leaves.

    Raises:
        RecipeError: see ``validate``.
        ProviderUnavailable: this build of onnxruntime lacks the provider; names those it has.
    """
    provider = validate(recipe)
    available = ort.get_available_providers()
    if provider.onnxruntime_name not in available:
        raise ProviderUnavailable(
            f"sought provider {recipe.provider!r} ({provider.onnxruntime_name}), this onnxruntime "
            f"{ort.__version__} has {available}; install or push a build that contains it"
        )
    options = dict(recipe.provider_options)
    if recipe.provider_flags:
        options["nnapi_flags"] = str(sum(provider.flags[flag] for flag in set(recipe.provider_flags)))
    chosen = [(provider.onnxruntime_name, options)]
    if recipe.provider != "cpu":
        chosen.append((PROVIDERS["cpu"].onnxruntime_name, {}))
    return chosen


def notes(recipe: SessionRecipe) -> tuple[str, ...]:
    """What in this recipe will have no effect, and what does the same instead."""
    found = []
    provider = validate(recipe)
    if recipe.provider_flags and provider.flag_note:
        found.append(provider.flag_note)
    training_only = [name for name in recipe.environment if name.startswith("ORTMODULE_")]
    if training_only:
        found.append(
            f"{', '.join(sorted(training_only))}: without effect on inference, read by onnxruntime's "
            "training builds only (mem_opt.json too); for inference use arena_shrinkage=true, arena=false or "
            "memory_pattern=false"
        )
    return tuple(found)
