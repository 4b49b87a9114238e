"""One artifact loaded into onnxruntime: shared by every Decoder that runs it."""

from __future__ import annotations

import os
import time
from collections import Counter
from functools import cached_property

import onnxruntime as ort

from kvengine import providers
from kvengine.artifact import Artifact
from kvengine.codes import Scales, no_scales, read_scales
from kvengine.contract import check_names
from kvengine.errors import failure_of
from kvengine.plan import CachePlan
from kvengine.recipe import SessionRecipe
from kvengine.sanity import check_identity
from kvengine.spec import ModelSpec
from kvengine.threads import choose_threads, count_threads

_OPTIMIZATION = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "layout": ort.GraphOptimizationLevel.ORT_ENABLE_LAYOUT,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class Model:
    """An InferenceSession with what the Decoder needs to know about it.

    Raises:
        RecipeError, ProviderUnavailable: the recipe asks for what there is not.
        EngineFailure: onnxruntime could not load the graph. MemoryError: for want of memory.
        ArtifactError: the graph was not built from the spec and recipe of the manifest.
    """

    def __init__(self, artifact: Artifact, recipe: SessionRecipe) -> None:
        self.artifact = artifact
        self.recipe = recipe
        self.threads = choose_threads() if recipe.threads is None else recipe.threads
        self.notes = providers.notes(recipe)
        chosen = providers.session_providers(recipe)
        os.environ.update(recipe.environment)
        others = count_threads()
        started = time.perf_counter()
        try:
            self.session = ort.InferenceSession(
                str(artifact.model_path), self._options(recipe), providers=chosen
            )
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise failure_of(error, f"onnxruntime could not load {artifact.model_path}") from error
        contract = artifact.manifest.contract
        if contract is None:
            check_identity(self.session, artifact.manifest)
        else:  # a foreign graph is not of our making
            check_names(contract, self.session)
        self.load_ms = (time.perf_counter() - started) * 1e3
        if not self.threads:
            # onnxruntime does not tell how many it took: its pool, and the thread that calls it.
            self.threads = count_threads() - others + 1
        self.run_options = ort.RunOptions()
        self.run_options.log_severity_level = 4
        if recipe.arena_shrinkage:
            self.run_options.add_run_config_entry(
                "memory.enable_memory_arena_shrinkage", f"{recipe.device_type}:{recipe.device_id}"
            )

    @cached_property
    def spec(self) -> ModelSpec:
        """Of the manifest; a foreign graph's cache has windows of its own."""
        manifest = self.artifact.manifest
        return manifest.spec if manifest.contract is None else manifest.contract.laid_out(manifest.spec)

    @property
    def plan(self) -> CachePlan:
        return self.artifact.manifest.recipe.cache

    @cached_property
    def cache_scales(self) -> list[Scales]:
        """Of K and V of each layer, [kv_heads, head_dim]; ones for float caches. Raises ArtifactError."""
        if self.plan.dtype not in ("int8", "int4"):
            return no_scales(self.spec.layers)
        return read_scales(self.artifact.folder, self.spec.layers)

    def nodes_by_provider(self) -> dict[str, int]:
        """Graph nodes each execution provider really took, after optimization."""
        count: Counter[str] = Counter()
        for subgraph in self.session.get_provider_graph_assignment_info():
            count[subgraph.ep_name] += len(subgraph.get_nodes())
        return dict(count)

    def _options(self, recipe: SessionRecipe) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = recipe.inter_threads
        options.graph_optimization_level = _OPTIMIZATION[recipe.optimization]
        options.enable_cpu_mem_arena = recipe.arena
        options.enable_mem_pattern = recipe.memory_pattern
        options.log_severity_level = 4  # errors come as exceptions
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        for key, value in recipe.session_config.items():
            options.add_session_config_entry(key, value)
        return options
