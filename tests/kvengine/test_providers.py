"""Providers, flags and environment: what is unknown is refused by name, what has no effect is said."""

from __future__ import annotations

import pytest

from kvengine.engine import LocalEngine
from kvengine.errors import ProviderUnavailable, RecipeError
from kvengine.providers import notes, session_providers, validate
from kvengine.recipe import ExportRecipe, SessionRecipe
from tests.conftest import ExportTiny


def test_an_unknown_provider_lists_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"'tpu'.*'cpu'.*'nnapi'"):
        validate(SessionRecipe(provider="tpu"))


def test_a_flag_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"SUSTAINED_SPEED.*USE_FP16, USE_NCHW, CPU_DISABLED, CPU_ONLY"):
        validate(SessionRecipe(provider="nnapi", provider_flags=("USE_FP16", "SUSTAINED_SPEED")))


def test_an_option_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"'cpu' has no option 'magic'"):
        validate(SessionRecipe(provider_options={"magic": "1"}))


@pytest.mark.parametrize("provider", ["nnapi", "xnnpack", "qnn", "cuda"])
def test_a_provider_this_build_lacks_names_those_it_has(provider: str) -> None:
    with pytest.raises(ProviderUnavailable, match=rf"{provider}.*CPUExecutionProvider"):
        session_providers(SessionRecipe(provider=provider))


def test_training_variables_are_accepted_and_reported_without_effect() -> None:
    recipe = SessionRecipe(environment={"ORTMODULE_MEMORY_OPT_LEVEL": "1", "OMP_NUM_THREADS": "2"})
    (note,) = notes(recipe)
    assert "ORTMODULE_MEMORY_OPT_LEVEL: without effect on inference" in note
    assert "OMP_NUM_THREADS" not in note
    assert "arena_shrinkage" in note


def test_every_node_is_counted_for_the_provider_that_took_it(export_tiny: ExportTiny) -> None:
    engine = LocalEngine.open(export_tiny(ExportRecipe()).folder, SessionRecipe(threads=1))
    ((provider, count),) = engine.info.nodes_by_provider.items()
    assert provider == "CPUExecutionProvider"
    layers = len(engine.model.spec.layers)
    assert count > 10 * layers  # each layer is at least ten operators, however well they fuse


def test_session_options_reach_onnxruntime(export_tiny: ExportTiny) -> None:
    recipe = SessionRecipe(
        threads=1,
        inter_threads=2,
        optimization="basic",
        arena=False,
        memory_pattern=False,
        session_config={"session.intra_op.allow_spinning": "0"},
    )
    options = LocalEngine.open(export_tiny(ExportRecipe()).folder, recipe).model.session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.inter_op_num_threads == 2
    assert options.enable_cpu_mem_arena is False
    assert options.enable_mem_pattern is False
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert str(options.graph_optimization_level).endswith("ORT_ENABLE_BASIC")
