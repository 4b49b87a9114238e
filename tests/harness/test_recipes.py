"""A recipe's text says all that makes an engine; what it cannot say is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.recipes import (
    DEFAULT_SLACK,
    PRESETS,
    ForeignModel,
    parse_recipe,
    parse_recipes,
    settings,
    with_models,
)
from kvengine.errors import RecipeError
from kvengine.plan import CachePlan
from kvengine.recipe import ExportRecipe, SessionRecipe


@pytest.mark.parametrize(
    ("name", "export"),
    [
        ("naive", ExportRecipe("float32", cache=CachePlan("growing", "float32"))),
        ("static", ExportRecipe("float32", cache=CachePlan("static", "float32"))),
        ("hybrid", ExportRecipe("float32", cache=CachePlan("hybrid", "float32", DEFAULT_SLACK))),
        ("hybrid-fp16kv", ExportRecipe("float32", cache=CachePlan("hybrid", "float16", DEFAULT_SLACK))),
        ("hybrid-int8kv", ExportRecipe("float32", cache=CachePlan("hybrid", "int8", DEFAULT_SLACK))),
        ("hybrid-int4kv", ExportRecipe("float32", cache=CachePlan("hybrid", "int4", DEFAULT_SLACK))),
        ("fp16", ExportRecipe("float16", cache=CachePlan("hybrid", "float32", DEFAULT_SLACK))),
        ("int8", ExportRecipe("int8", cache=CachePlan("hybrid", "float32", DEFAULT_SLACK))),
        ("int4", ExportRecipe("int4", 32, cache=CachePlan("hybrid", "float32", DEFAULT_SLACK))),
        ("int4-b128", ExportRecipe("int4", 128, cache=CachePlan("hybrid", "float32", DEFAULT_SLACK))),
    ],
)
def test_presets(name: str, export: ExportRecipe) -> None:
    recipe = parse_recipe(name)
    session = SessionRecipe(threads=0, io_binding=False, logits="all") if name == "naive" else SessionRecipe()
    assert (recipe.name, recipe.export, recipe.session) == (name, export, session)


def test_every_preset_is_tested_above_and_differs_from_the_others() -> None:
    assert len(set(map(str, PRESETS.values()))) == len(PRESETS) == 10


def test_overrides() -> None:
    recipe = parse_recipe(
        "hybrid, threads=2, cache-dtype=int8, slack=16, provider=nnapi, flags=USE_FP16+CPU_DISABLED, "
        "optimization=basic, arena=off, arena_shrinkage=true, block-size=64, weights=int4, inter-threads=3, "
        "memory-pattern=off, activations=float16, device-type=cuda, device-id=1, io-binding=off, "
        "logits=all, env.OMP_NUM_THREADS=1, "
        "config.session.intra_op.allow_spinning=0"
    )
    assert recipe.export == ExportRecipe("int4", 64, "float16", CachePlan("hybrid", "int8", 16))
    assert recipe.session == SessionRecipe(
        provider="nnapi",
        provider_flags=("USE_FP16", "CPU_DISABLED"),
        threads=2,
        inter_threads=3,
        optimization="basic",
        arena=False,
        arena_shrinkage=True,
        memory_pattern=False,
        device_type="cuda",
        device_id=1,
        io_binding=False,
        logits="all",
        environment={"OMP_NUM_THREADS": "1"},
        session_config={"session.intra_op.allow_spinning": "0"},
    )


def test_provider_options_are_kept_together() -> None:
    recipe = parse_recipe("int4,provider=qnn,option.backend_path=libQnnHtp.so,option.profiling_level=basic")
    assert recipe.session.provider_options == {"backend_path": "libQnnHtp.so", "profiling_level": "basic"}


def test_the_name_is_the_text_without_its_blanks() -> None:
    assert parse_recipe(" hybrid , threads=2 ").name == "hybrid,threads=2"


def test_a_hybrid_made_static_has_no_slack() -> None:
    assert parse_recipe("hybrid,cache=static").export.cache == CachePlan("static")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hybird", "found 'hybird'; there are naive, static, hybrid,"),
        ("", "found ''"),
        ("hybrid,thread=2", "unknown key 'thread'; keys are weights,.*env.NAME"),
        ("hybrid,threads", "sought KEY=VALUE, found 'threads'"),
        ("hybrid,threads=0", "whole number of at least 1"),
        ("hybrid,threads=two", "whole number"),
        ("hybrid,slack=-1", "at least 0"),
        ("hybrid,block-size=48", "sought one of 32, 64, 128"),
        ("hybrid,cache-dtype=bfloat16", "sought one of float32, float16, int8, int4"),
        ("hybrid,arena=maybe", "sought on or off"),
        ("hybrid,env.=1", "unknown key 'env.'"),
        ("static,slack=4", "a static cache has none"),
        ("hybrid,provider=npu", "unknown provider 'npu'"),
        ("hybrid,provider=nnapi,flags=SUSTAINED_SPEED", "no flag 'SUSTAINED_SPEED'; it has: USE_FP16"),
        ("hybrid,flags=USE_FP16", "'cpu' has no flag 'USE_FP16'"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text)


def test_several_recipes_in_one_text() -> None:
    names = [r.name for r in parse_recipes("naive,hybrid,threads=2,arena=off; int4")]
    assert names == ["naive", "hybrid,threads=2,arena=off", "int4"]


def test_threads_may_be_left_to_onnxruntime() -> None:
    recipe = parse_recipe("int4,threads=ort")
    assert recipe.session.threads == 0
    assert settings(recipe)["threads"] == "onnxruntime's choice"
    with pytest.raises(RecipeError, match="at least 1"):
        parse_recipe("int4,threads=0")


@pytest.mark.parametrize("text", ["", " , ", "naive,naive", "threads=2"])
def test_no_recipe_or_one_twice_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipes(text)


def test_settings_say_every_choice() -> None:
    said = settings(parse_recipe("int4,threads=2,env.A=b,provider=nnapi,flags=USE_FP16"))
    assert said["weights"] == "int4"
    assert said["block size"] == "32"
    assert said["slack"] == f"{DEFAULT_SLACK} rows"
    assert said["threads"] == "2"
    assert said["environment A"] == "b"
    assert said["provider flags"] == "USE_FP16"
    assert "block size" not in settings(parse_recipe("hybrid"))


def test_no_two_presets_have_the_same_settings() -> None:
    assert len({str(settings(parse_recipe(name))) for name in PRESETS}) == len(PRESETS)


def test_a_foreign_model_is_named_by_its_path_and_answers() -> None:
    recipe = parse_recipe("onnx,model=a/b.onnx,threads=2,set.past.layout=bnsh,set.past.window=5")
    assert recipe.foreign == ForeignModel(Path("a/b.onnx"), (("past.layout", "bnsh"), ("past.window", "5")))
    assert recipe.session.threads == 2
    said = settings(recipe)
    assert (said["model"], said["past.layout"]) == ("a/b.onnx", "bnsh")
    names = [each.name for each in parse_recipes("hybrid,onnx,model=a.onnx,threads=1,naive")]
    assert names == ["hybrid", "onnx,model=a.onnx,threads=1", "naive"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("onnx", "sought one model=PATH, found 0"),
        ("onnx,model=", "sought one model=PATH"),
        ("onnx,model=a,model=b", "sought one model=PATH, found 2"),
        ("onnx,model=a,weights=int4", "weights is the model's own"),
        ("onnx,model=a,cache=hybrid", "cache is the model's own"),
        ("onnx,model=a,io-binding=off", "driven by IO binding"),
        ("onnx,model=a,colour=red", "unknown key 'colour'"),
        ("onnx,model=a,provider=abacus", "abacus"),
        ("nonsense", "onnx"),
    ],
)
def test_a_foreign_recipe_that_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("text", "paths", "names"),
    [
        ("", ["a"], ["onnx,model=a"]),
        ("onnx", ["a"], ["onnx,model=a"]),
        ("onnx,threads=2", ["a", "b"], ["onnx,model=a,threads=2", "onnx,model=b,threads=2"]),
        ("naive,onnx,set.past.window=5,int4", ["a"], ["naive", "int4", "onnx,model=a,set.past.window=5"]),
        ("hybrid,onnx,model=c", ["a"], ["hybrid", "onnx,model=c", "onnx,model=a"]),
        ("onnx,threads=1,onnx,threads=2", ["a"], ["onnx,model=a,threads=1", "onnx,model=a,threads=2"]),
        ("hybrid", [], ["hybrid"]),
    ],
)
def test_models_brought_beside_the_recipes(text: str, paths: list[str], names: list[str]) -> None:
    assert [recipe.name for recipe in parse_recipes(with_models(text, paths))] == names


def test_a_foreign_recipe_without_any_model_says_how_to_name_one() -> None:
    with pytest.raises(RecipeError, match="onnx,model=PATH, or give the file to --onnx"):
        parse_recipes(with_models("onnx", []))
