"""The suite on models that somebody else exported: right ones pass, wrong ones fail, and what one cannot
do is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from device_agents import messages
from harness import suite
from harness.artifacts import artifact_of, resolved
from harness.checking import Cell, Unsupported, applies
from harness.compare import CheckFailed
from harness.recipes import parse_recipe
from harness.reference import CachedReference, Reference, TransformersReference
from harness.synth import synth
from kvengine.engine import LocalEngine
from kvengine.errors import NotSupported
from kvengine.export import export
from kvengine.export.foreign import contradictions, inspect_model
from kvengine.export.genai import GRAPH
from kvengine.plan import PlanKind
from kvengine.program import Observation, Program
from kvengine.recipe import SessionRecipe
from kvengine.session import EngineSession
from tests import foreign_exporters, foreign_models
from tests.foreign_models import WINDOW, Twist

CHECKS: dict[str, Callable[[Cell], None]] = {check.__name__: check for check in suite.checks()}
# What no foreign model can be asked, and what no ring can besides.
NEED_MORE = {
    "test_p02_windowed_layers_equal_full_length_layers",
    "test_p12_buffers_are_nobody_elses",
    "test_p07_beams_follow_their_parents",
    "test_p07_ragged_rows_equal_rows_alone",
}
OF_RINGS = {
    "test_any_program_equals_the_reference",
    "test_compaction_hides_and_keeps_distances",
    "test_p11_a_damaged_state_is_refused_and_harms_nothing",
    "test_p11_saved_loaded_and_forked_equal_the_original",
}
EXPORTS: dict[str, Callable[..., Path]] = {
    "optimum": foreign_models.decomposed,
    "optimum, no position_ids": lambda *a, **k: foreign_models.decomposed(*a, position_ids=False, **k),
    "scatter, fixed": lambda *a, **k: foreign_models.scattering(*a, rows=64, circular=False, **k),
    "scatter": foreign_models.scattering,
    "ring": lambda *a, **k: foreign_models.scattering(*a, rows=WINDOW + 4, **k),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> dict[str, tuple[Path, Reference]]:
    """Without and with a sliding window, and with one in every second layer; each with its reference."""
    made = {
        "full": foreign_models.checkpoint(folder / "full"),
        "windowed": foreign_models.checkpoint(folder / "windowed", WINDOW),
        "gemma2": synth("tiny-gemma2", folder / "gemma2"),
    }
    return {name: (path, CachedReference(TransformersReference(path))) for name, path in made.items()}


@pytest.fixture(scope="module")
def built_by_genai(checkpoints: dict[str, tuple[Path, Reference]], folder: Path) -> dict[str, Path]:
    sources = {name: source for name, (source, _) in checkpoints.items()}
    return foreign_exporters.genai(sources, folder / "genai")


def cell_of(model: Path, checkpoint: tuple[Path, Reference], folder: Path, examples: int = 15) -> Cell:
    path, reference = checkpoint
    recipe = resolved(parse_recipe(f"onnx,model={model}"), path)
    artifact = artifact_of(path, recipe, folder / "artifacts")
    engine = LocalEngine.open(artifact.folder, SessionRecipe(threads=1))

    def open_plan(kind: str) -> LocalEngine:
        if kind != recipe.export.cache.kind:
            raise NotSupported("a model brought has one cache plan")
        return engine

    return Cell("here", recipe, artifact.manifest.spec, reference, open_plan, examples=examples, seed=1)


def outcomes(cell: Cell) -> dict[str, str]:
    found = {}
    for name, check in CHECKS.items():
        if not applies({mark.name for mark in getattr(check, "pytestmark", [])}, cell.recipe):
            continue
        try:
            check(cell)
        except Unsupported as error:
            found[name] = f"not supported: {error}"
        except CheckFailed as error:
            found[name] = f"failed: {error}"
        else:
            found[name] = "passed"
    return found


@pytest.mark.parametrize(
    ("export", "checkpoint"),
    [
        ("optimum", "windowed"),
        ("optimum, no position_ids", "full"),
        ("scatter", "full"),
        ("scatter, fixed", "full"),
        ("ring", "windowed"),
    ],
)
def test_a_right_export_passes_whatever_its_convention(
    export: str, checkpoint: str, checkpoints: dict[str, tuple[Path, Reference]], folder: Path
) -> None:
    source = checkpoints[checkpoint][0]
    model = EXPORTS[export](source, folder / f"{export.replace(' ', '-').replace(',', '')}.onnx")
    cell = cell_of(model, checkpoints[checkpoint], folder)
    found = outcomes(cell)
    failed = {name: why for name, why in found.items() if why.startswith("failed")}
    assert not failed
    unsupported = {name: why for name, why in found.items() if why.startswith("not supported")}
    assert set(unsupported) <= NEED_MORE | (OF_RINGS if export == "ring" else set()), unsupported
    assert found["test_p01_every_step_equals_the_reference"] == "passed"
    assert cell.take_tally().rows > 100


@pytest.mark.parametrize(
    ("export", "twist", "checkpoint"),
    [
        ("optimum", "window", "windowed"),
        ("optimum", "positions", "full"),
        ("optimum", "heads", "full"),
        ("optimum", "theta", "full"),
        ("optimum, no position_ids", "window", "windowed"),
        ("ring", "window", "windowed"),
        ("ring", "positions", "windowed"),
        ("scatter", "positions", "full"),
    ],
)
def test_a_wrong_export_fails(
    export: str, twist: Twist, checkpoint: str, checkpoints: dict[str, tuple[Path, Reference]], tmp_path: Path
) -> None:
    model = EXPORTS[export](checkpoints[checkpoint][0], tmp_path / "model.onnx", twist=twist)
    cell = cell_of(model, checkpoints[checkpoint], tmp_path)
    with pytest.raises(CheckFailed, match=r"logits differ from the reference|greedy token"):
        CHECKS["test_p01_every_step_equals_the_reference"](cell)


def test_what_a_graph_cannot_do_is_said(
    checkpoints: dict[str, tuple[Path, Reference]], tmp_path: Path
) -> None:
    """One that returns the last row of logits only cannot be asked for every row."""
    model = foreign_models.decomposed(checkpoints["full"][0], tmp_path / "model.onnx", last_row=True)
    cell = cell_of(model, checkpoints["full"], tmp_path, examples=40)
    with pytest.raises(Unsupported, match="last token only"):
        CHECKS["test_p01_every_step_equals_the_reference"](cell)


def test_another_plan_of_a_foreign_model_is_not_supported(
    checkpoints: dict[str, tuple[Path, Reference]], folder: Path, tmp_path: Path
) -> None:
    model = EXPORTS["ring"](checkpoints["windowed"][0], tmp_path / "model.onnx")
    cell = cell_of(model, checkpoints["windowed"], tmp_path)
    with pytest.raises(Unsupported, match="one cache plan"):
        CHECKS["test_p02_windowed_layers_equal_full_length_layers"](cell)


def test_a_real_export_of_optimum_passes(
    checkpoints: dict[str, tuple[Path, Reference]], tmp_path: Path
) -> None:
    model = foreign_exporters.optimum(checkpoints["windowed"][0], tmp_path / "model.onnx")
    found = outcomes(cell_of(model, checkpoints["windowed"], tmp_path))
    assert {name for name, why in found.items() if why != "passed"} <= NEED_MORE


@pytest.mark.parametrize(("checkpoint", "kind"), [("full", "static"), ("gemma2", "hybrid")])
def test_a_real_model_of_genais_builder_passes(
    checkpoint: str,
    kind: str,
    built_by_genai: dict[str, Path],
    checkpoints: dict[str, tuple[Path, Reference]],
    tmp_path: Path,
) -> None:
    """Of Gemma 2 every second layer has a buffer of its window's size (sliding_window_cache)."""
    cell = cell_of(built_by_genai[checkpoint], checkpoints[checkpoint], tmp_path)
    assert cell.recipe.export.cache.kind == kind
    found = outcomes(cell)
    assert {name for name, why in found.items() if why != "passed"} <= NEED_MORE


def test_a_window_that_genais_builder_drops_is_found(
    built_by_genai: dict[str, Path], checkpoints: dict[str, tuple[Path, Reference]], tmp_path: Path
) -> None:
    """The builder of onnxruntime-genai 0.18 takes a layer for local by ``layer_types`` alone, which Mistral's
    config has not: its GroupQueryAttention gets local_window_size -1 (catalogue 7 in the wild)."""
    cell = cell_of(built_by_genai["windowed"], checkpoints["windowed"], tmp_path)
    with pytest.raises(CheckFailed, match=f"token position {WINDOW}|greedy token"):
        CHECKS["test_p01_every_step_equals_the_reference"](cell)


# -- the graph that our own artifacts carry for other runtimes ---------------------------------------


@pytest.fixture(scope="module")
def tiny(folder: Path) -> tuple[Path, Reference]:
    path = synth("tiny-gemma3", folder / "tiny-gemma3")
    return path, CachedReference(TransformersReference(path))


@pytest.mark.parametrize("recipe", ["hybrid-int8kv,slack=2", "naive,cache-dtype=int4"])
def test_a_quantized_cache_comes_back(recipe: str, tiny: tuple[Path, Reference], tmp_path: Path) -> None:
    """Its scales are constants of the graph; the properties that look at codes are asked as well."""
    artifact = export(tiny[0], tmp_path / "artifact", parse_recipe(recipe).export)
    cell = cell_of(artifact.folder / GRAPH, tiny, tmp_path, examples=6)
    ours, theirs = artifact.manifest.recipe.cache, cell.recipe.export.cache
    assert (theirs.kind, theirs.dtype) == (ours.kind, ours.dtype)
    found = outcomes(cell)
    assert {name for name, why in found.items() if why != "passed"} <= NEED_MORE
    assert found["test_p13_codes_are_the_nearest"] == "passed"


def test_another_window_than_the_checkpoints_is_found(tiny: tuple[Path, Reference], tmp_path: Path) -> None:
    """A wrong graph is a failure of the model; that its cache holds other rows stops nothing."""
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    for file in tiny[0].iterdir():
        (narrow / file.name).write_bytes(file.read_bytes())
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"sliding_window": 3}))
    artifact = export(narrow, tmp_path / "artifact", parse_recipe("hybrid,slack=0").export)
    model = artifact.folder / GRAPH
    contract = inspect_model(model).complete()
    assert contradictions(tiny[0], contract) == [
        "window of layer 0, 1, 3, 4: sought 5 (config.json), found 3"
    ]
    assert contradictions(narrow, contract) == []
    cell = cell_of(model, tiny, tmp_path)

    def framed(plan: PlanKind) -> EngineSession:
        return cast("EngineSession", Framed(cell.open_plan(plan)))

    for name in (
        "test_p03_the_cache_holds_the_newest_positions",
        "test_p04_a_window_ends_where_it_should",
        "test_any_program_equals_the_reference",
    ):
        with pytest.raises(CheckFailed):
            CHECKS[name](replace(cell, open_plan=framed, shrink=False))


class Framed:
    """An engine whose answers come as those of a device do, in frames that are checked."""

    def __init__(self, engine: EngineSession) -> None:
        self._engine = engine

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        reply, arrays = messages.pack_observations(self._engine.run_program(program))
        return messages.unpack_observations(reply, arrays, len(program.operations))
