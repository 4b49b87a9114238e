"""The ladder from the naive decoder to the full engine, and the order in which its rungs are measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness import cli
from harness.ablation.run import SEED_SHAPE, _plan, head_share
from harness.ablation.steps import ladder, order
from harness.presets import PRESETS
from harness.recipes import Recipe, parse_recipe, parse_recipes
from harness.run import DeviceRun
from harness.store import open_store
from kvengine.export import load_spec
from tests.reports.sample import run as sample_run

CHANGES = [
    ("static", {"cache.kind": "static"}),
    ("binding", {"io_binding": True}),
    ("logits", {"logits": "last"}),
    ("windowed", {"cache.kind": "hybrid", "cache.slack": 32}),
    ("float16", {"cache.dtype": "float16"}),
    ("int8", {"cache.dtype": "int8"}),
    ("threads", {"threads": None}),
]


def flat(recipe: Recipe) -> dict[str, Any]:
    export, session = dataclasses.asdict(recipe.export), dataclasses.asdict(recipe.session)
    cache = export.pop("cache")
    return export | session | {f"cache.{name}": value for name, value in cache.items()}


def test_the_first_rung_is_onnxruntime_as_it_comes() -> None:
    first = flat(parse_recipe(ladder("int4").rungs[0].recipe))
    naive = {"cache.kind": "growing", "io_binding": False, "logits": "all", "threads": 0, "weights": "int4"}
    assert {key: first[key] for key in naive} == naive


def test_every_rung_turns_on_one_thing_and_keeps_the_rest() -> None:
    rungs = ladder("int4").rungs
    assert [rung.key for rung in rungs[1:]] == [key for key, _ in CHANGES]
    for before, after, (key, change) in zip(rungs, rungs[1:], CHANGES, strict=False):
        old, new = flat(parse_recipe(before.recipe)), flat(parse_recipe(after.recipe))
        assert {name: value for name, value in new.items() if old[name] != value} == change, key


def test_the_last_rung_is_the_engine_as_it_is_shipped() -> None:
    last = parse_recipe(ladder("int4").rungs[-1].recipe)
    shipped = parse_recipe("hybrid-int8kv,weights=int4")
    assert (last.export, last.session) == (shipped.export, shipped.session)


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_weights_are_the_same_on_every_rung(weights: Any) -> None:
    found = ladder(weights)
    assert {parse_recipe(rung.recipe).export.weights for rung in found.rungs} == {weights}
    assert (found.unquantised is None) == (weights == "float32")


def test_quantised_weights_are_a_step_of_their_own() -> None:
    found = ladder("int4")
    assert found.unquantised is not None
    full, other = flat(parse_recipe(found.rungs[-1].recipe)), flat(parse_recipe(found.unquantised.recipe))
    assert {name: value for name, value in other.items() if full[name] != value} == {"weights": "float32"}
    assert ladder("int4", with_unquantised=False).all == found.rungs


def test_the_recipes_can_stand_in_one_text() -> None:
    names = [step.recipe for step in ladder("int4").all]
    assert [recipe.name for recipe in parse_recipes(";".join(names))] == names


@pytest.mark.parametrize("count", [1, 2, 8, 9])
def test_over_two_rounds_every_step_has_the_same_mean_place(count: int) -> None:
    for turn in (0, 2, 4):
        one, two = order(count, turn), order(count, turn + 1)
        assert sorted(one) == sorted(two) == list(range(count))
        assert {one.index(step) + two.index(step) for step in range(count)} == {count - 1}


def test_unquantised_weights_are_measured_in_one_pair_of_rounds() -> None:
    run = cast(DeviceRun, SimpleNamespace(devices=("one", "two")))
    steps = ladder("int4")
    legs = list(_plan(run, steps, rounds=4))
    assert steps.unquantised is not None
    assert len(legs) == 2 * (2 * 9 + 2 * 8)
    assert [leg[1] for leg in legs].count(steps.unquantised.recipe) == 2 * 2
    assert [weighed for _, _, weighed in legs] == [True] * 18 + [False] * 50


def test_pairs_of_rounds_begin_elsewhere() -> None:
    assert len({order(9, turn)[0] for turn in (0, 2, 4)}) == 3


def test_the_seeds_own_context_is_measured() -> None:
    assert SEED_SHAPE.prompt + SEED_SHAPE.new_tokens == 1024


def test_the_heads_share_of_gemma_3_1b() -> None:
    """262,144 x 1,152 against 26 layers of 26.8 million weights."""
    spec = load_spec(PRESETS["gemma-3-1b"].config)
    layer = 1152 * 256 * (4 + 1 + 1 + 4) + 3 * 1152 * 6912
    assert head_share(spec) == pytest.approx(262_144 * 1152 / (262_144 * 1152 + 26 * layer))
    assert head_share(spec) == pytest.approx(0.302, abs=0.001)


def test_nothing_to_measure_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["ablate"]) == 2
    assert "--again RUN" in capsys.readouterr().err


def test_a_run_that_is_no_ablation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "results.db"
    with open_store(store) as opened:
        opened.begin_run(sample_run())
    assert cli.run(["ablate", "--json", "--again", sample_run().run_id, "--store", str(store)]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "StoreError"
    assert "kvfarm report" in error["message"]
