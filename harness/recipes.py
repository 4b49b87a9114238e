"""Recipes by name: ``hybrid``, ``hybrid,threads=2,provider=nnapi,flags=USE_FP16+CPU_DISABLED``.

``onnx,model=PATH`` is a model that somebody else exported; ``set.KEY=VALUE`` says what its graph does
not (see ``kvfarm inspect``).

A recipe's text is its name in reports, so the same text always means the same engine.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvengine.errors import NotSupported, RecipeError
from kvengine.plan import CachePlan, PlanKind
from kvengine.providers import validate
from kvengine.recipe import ExportRecipe, SessionRecipe

# A windowed layer moves its window down once every slack + 1 tokens. At 32 rows, a 512-token window
# copies 16 rows a token (3 % of what attention reads of it anyway) for 6 % more memory.
DEFAULT_SLACK = 32


FOREIGN = "onnx"


@dataclass(frozen=True)
class ForeignModel:
    """An ONNX file that somebody else exported. answers: what its graph does not say, by option."""

    path: Path
    answers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """One named way to turn a checkpoint into a running engine.

    foreign: the engine's graph where it is not ours; ``export`` is then what the graph is found to be
        (harness.artifacts.resolved), not what anybody chose.
    """

    name: str
    export: ExportRecipe
    session: SessionRecipe
    foreign: ForeignModel | None = None


def _hybrid(dtype: str = "float32") -> CachePlan:
    return CachePlan("hybrid", typing.cast(Any, dtype), slack=DEFAULT_SLACK)


PRESETS: dict[str, ExportRecipe] = {
    "naive": ExportRecipe(cache=CachePlan("growing")),
    "static": ExportRecipe(cache=CachePlan("static")),
    "hybrid": ExportRecipe(cache=_hybrid()),
    "hybrid-fp16kv": ExportRecipe(cache=_hybrid("float16")),
    "hybrid-int8kv": ExportRecipe(cache=_hybrid("int8")),
    "hybrid-int4kv": ExportRecipe(cache=_hybrid("int4")),
    "fp16": ExportRecipe(weights="float16", cache=_hybrid()),
    "int8": ExportRecipe(weights="int8", cache=_hybrid()),
    "int4": ExportRecipe(weights="int4", cache=_hybrid()),
    "int4-b128": ExportRecipe(weights="int4", block_size=128, cache=_hybrid()),
}

# How onnxruntime is used before anybody has thought about it.
_NAIVE = SessionRecipe(threads=0, io_binding=False, logits="all")


def parse_recipe(text: str) -> Recipe:
    """``PRESET[,KEY=VALUE...]`` as a Recipe.

    Raises:
        RecipeError: an unknown preset, key, value, provider or flag; the message lists those there are.
    """
    name, *overrides = [part.strip() for part in text.split(",")]
    if name == FOREIGN:
        return _foreign(",".join([name, *overrides]), overrides)
    if name not in PRESETS:
        known = _list([*PRESETS, FOREIGN])
        raise RecipeError(f"recipe {text!r}: sought a preset, found {name!r}; there are {known}")
    recipe = Recipe(
        ",".join([name, *overrides]), PRESETS[name], _NAIVE if name == "naive" else SessionRecipe()
    )
    for override in overrides:
        recipe = _override(recipe, override)
    cache = recipe.export.cache
    if cache.kind != "hybrid" and cache.slack:
        # `hybrid,cache=static` inherits a slack that means nothing there; one given by hand is a mistake.
        if any(o.startswith("slack=") for o in overrides):
            raise RecipeError(f"recipe {text!r}: slack is rows above a window; a {cache.kind} cache has none")
        recipe = _with_cache(recipe, slack=0)
    validate(recipe.session)
    return recipe


def parse_recipes(text: str) -> tuple[Recipe, ...]:
    """Several recipes in one text: ``naive,hybrid,threads=2,int4`` is naive; hybrid,threads=2; int4.

    A part without ``=`` begins the next recipe, since every override has one; ``;`` works too.

    Raises:
        RecipeError: none given, one given twice, or what parse_recipe refuses.
    """
    recipes = tuple(parse_recipe(",".join(group)) for group in _grouped(text))
    if not recipes:
        raise RecipeError(f"sought at least one recipe, found {text!r}; presets are {_list(PRESETS)}")
    names = [r.name for r in recipes]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise RecipeError(f"recipe {twice[0]!r} is given twice; name each once")
    return recipes


def with_models(text: str, paths: Sequence[str]) -> str:
    """``text`` with a recipe for each ONNX file of ``paths``.

    A recipe ``onnx`` without a model in ``text`` stands for all of them, with its overrides.
    """
    groups = _grouped(text)
    templates = [g for g in groups if g[0] == FOREIGN and not any(part.startswith("model=") for part in g)]
    if not paths or not templates:
        made = [[FOREIGN, f"model={path}"] for path in paths]
        return ";".join(",".join(group) for group in [*groups, *made])
    made = [[FOREIGN, f"model={path}", *overrides] for _, *overrides in templates for path in paths]
    return ";".join(",".join(group) for group in [*(g for g in groups if g not in templates), *made])


def _grouped(text: str) -> list[list[str]]:
    """The parts of each recipe; see parse_recipes."""
    groups: list[list[str]] = []
    for part in filter(None, (p.strip() for p in text.replace(";", ",").split(","))):
        if "=" not in part or not groups:
            groups.append([])
        groups[-1].append(part)
    return groups


def _foreign(name: str, overrides: list[str]) -> Recipe:
    pairs = [override.partition("=")[::2] for override in overrides]
    paths = [value for key, value in pairs if key == "model"]
    if len(paths) != 1 or not paths[0]:
        raise RecipeError(
            f"recipe {name!r}: sought one model=PATH, found {len(paths)}; say onnx,model=PATH, or give the "
            "file to --onnx of pytest"
        )
    answers = {key.removeprefix("set."): value for key, value in pairs if key.startswith("set.")}
    model = ForeignModel(Path(paths[0]), tuple(sorted(answers.items())))
    plain = recipe = Recipe(name, ExportRecipe(cache=CachePlan("growing")), SessionRecipe(), model)
    for override, (key, _) in zip(overrides, pairs, strict=True):
        if key != "model" and not key.startswith("set."):
            recipe = _override(recipe, override)
            if recipe.export != plain.export:
                raise RecipeError(f"recipe {name!r}: {key} is the model's own and cannot be chosen here")
    if not recipe.session.io_binding or recipe.session.logits != "last":
        raise RecipeError(f"recipe {name!r}: a foreign model is driven by IO binding, with the logits it has")
    validate(recipe.session)
    return recipe


def settings(recipe: Recipe) -> dict[str, str]:
    """Every choice in words, for reports; what is at its default and without meaning here is left out."""
    export, session = recipe.export, recipe.session
    said = {"model": str(recipe.foreign.path), **dict(recipe.foreign.answers)} if recipe.foreign else {}
    said |= {
        "weights": export.weights,
        "activations": export.activations,
        "cache": export.cache.kind,
        "cache dtype": export.cache.dtype,
        "provider": session.provider,
        "threads": _threads(session.threads),
        "inter-op threads": str(session.inter_threads),
        "graph optimization": session.optimization,
        "arena": _on(session.arena),
        "arena shrinkage": _on(session.arena_shrinkage),
        "memory pattern": _on(session.memory_pattern),
        "buffers on": f"{session.device_type}:{session.device_id}",
        "IO binding": _on(session.io_binding),
        "logits": "of every prompt token" if session.logits == "all" else "of the last token",
    }
    if export.weights in ("int8", "int4") and not recipe.foreign:
        said["block size"] = str(export.block_size)
    if export.cache.kind == "hybrid" and not recipe.foreign:
        said["slack"] = f"{export.cache.slack} rows"
    if session.provider_flags:
        said["provider flags"] = " ".join(session.provider_flags)
    for title, pairs in (
        ("option", session.provider_options),
        ("environment", session.environment),
        ("session config", session.session_config),
    ):
        said.update({f"{title} {key}": value for key, value in pairs.items()})
    return said


def with_plan(recipe: Recipe, plan: PlanKind) -> Recipe:
    """The same recipe with another kind of cache plan; windowed slack means nothing elsewhere."""
    cache = recipe.export.cache
    if cache.kind == plan:
        return recipe
    if recipe.foreign is not None:
        raise NotSupported(
            f"{recipe.foreign.path} has one cache plan, {cache.kind}; {plan} would be another export"
        )
    return _with_export(recipe, cache=CachePlan(plan, cache.dtype))


def _override(recipe: Recipe, text: str) -> Recipe:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"recipe {recipe.name!r}: sought KEY=VALUE, found {text!r}; keys are {_keys()}")
    family, dot, name = key.partition(".")
    key = key.replace("_", "-")  # the field's own spelling will do
    if dot and name and family in _FAMILIES:
        field = _FAMILIES[family]
        return _with_session(recipe, **{field: {**getattr(recipe.session, field), name: value}})
    if key not in _KEYS:
        raise RecipeError(f"recipe {recipe.name!r}: unknown key {key!r}; keys are {_keys()}")
    replace, kind, field = _KEYS[key]
    return replace(recipe, **{field: _value(kind, field, key, value)})


def _value(kind: type, field: str, key: str, text: str) -> Any:
    """``text`` as the type that ``field`` of the dataclass ``kind`` has."""
    hint = typing.get_type_hints(kind)[field]
    if typing.get_origin(hint) is typing.Literal:
        choices = {str(a): a for a in typing.get_args(hint)}
        if text not in choices:
            raise RecipeError(f"{key}={text}: sought one of {_list(choices)}")
        return choices[text]
    if hint is bool:
        if text not in ("on", "off", "true", "false"):
            raise RecipeError(f"{key}={text}: sought on or off")
        return text in ("on", "true")
    if hint is str:
        return text
    if hint == tuple[str, ...]:
        return tuple(filter(None, text.split("+")))
    if field == "threads" and text == "ort":
        return 0
    least = 0 if field in ("slack", "device_id") else 1
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise RecipeError(f"{key}={text}: sought a whole number of at least {least}")
    return int(text)


def _with_export(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, export=dataclasses.replace(recipe.export, **changes))


def _with_cache(recipe: Recipe, **changes: Any) -> Recipe:
    return _with_export(recipe, cache=dataclasses.replace(recipe.export.cache, **changes))


def _with_session(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, session=dataclasses.replace(recipe.session, **changes))


# key in the text: how to replace it, the dataclass it lives in, its field there
_KEYS: dict[str, tuple[Callable[..., Recipe], type, str]] = {
    "weights": (_with_export, ExportRecipe, "weights"),
    "block-size": (_with_export, ExportRecipe, "block_size"),
    "activations": (_with_export, ExportRecipe, "activations"),
    "cache": (_with_cache, CachePlan, "kind"),
    "cache-dtype": (_with_cache, CachePlan, "dtype"),
    "slack": (_with_cache, CachePlan, "slack"),
    "provider": (_with_session, SessionRecipe, "provider"),
    "flags": (_with_session, SessionRecipe, "provider_flags"),
    "threads": (_with_session, SessionRecipe, "threads"),
    "inter-threads": (_with_session, SessionRecipe, "inter_threads"),
    "optimization": (_with_session, SessionRecipe, "optimization"),
    "arena": (_with_session, SessionRecipe, "arena"),
    "arena-shrinkage": (_with_session, SessionRecipe, "arena_shrinkage"),
    "memory-pattern": (_with_session, SessionRecipe, "memory_pattern"),
    "device-type": (_with_session, SessionRecipe, "device_type"),
    "device-id": (_with_session, SessionRecipe, "device_id"),
    "io-binding": (_with_session, SessionRecipe, "io_binding"),
    "logits": (_with_session, SessionRecipe, "logits"),
}
_FAMILIES = {"option": "provider_options", "env": "environment", "config": "session_config"}


def _keys() -> str:
    return _list([*_KEYS, *(f"{family}.NAME" for family in _FAMILIES)])


def _list(names: typing.Iterable[str]) -> str:
    return ", ".join(names)


def _threads(count: int | None) -> str:
    return "chosen per device" if count is None else str(count) if count else "onnxruntime's choice"


def _on(value: bool) -> str:
    return "on" if value else "off"
