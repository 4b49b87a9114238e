"""Recipes: every choice that turns one checkpoint into one measured engine.

An ExportRecipe is baked into the artifact; a SessionRecipe is chosen when it is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvengine.plan import CachePlan

Weights = Literal["float32", "float16", "int8", "int4"]


@dataclass(frozen=True)
class ExportRecipe:
    """weights: storage of the matrices; block_size: weights per scale (int8, int4 only).

    activations: element type between the operators; float16 is for GPU providers.
    """

    weights: Weights = "float32"
    block_size: Literal[32, 64, 128] = 32
    activations: Literal["float32", "float16"] = "float32"
    cache: CachePlan = field(default_factory=lambda: CachePlan("hybrid"))


@dataclass(frozen=True)
class SessionRecipe:
    """How onnxruntime runs an artifact on one device.

    threads: None is chosen for the device by kvfarm, 0 is onnxruntime's own choice, which looks at the
        machine and not at what this process may use.
    io_binding, logits: off and "all" are how a first port decodes; see ``kvengine.unbound``.
    """

    provider: str = "cpu"  # a key of kvengine.providers.PROVIDERS
    provider_flags: tuple[str, ...] = ()  # e.g. ("USE_FP16",) for nnapi
    provider_options: dict[str, str] = field(default_factory=dict)
    threads: int | None = None  # intra-op
    inter_threads: int = 1
    optimization: Literal["disabled", "basic", "extended", "layout", "all"] = "all"
    arena: bool = True
    arena_shrinkage: bool = False  # give arena memory back after every run
    memory_pattern: bool = True
    device_type: str = "cpu"  # where IO binding puts the buffers: cpu, cuda, ...
    device_id: int = 0
    io_binding: bool = True  # off: session.run, every tensor copied in and out of numpy each step
    logits: Literal["last", "all"] = "last"  # all: a generation computes a row for every prompt token
    environment: dict[str, str] = field(default_factory=dict)
    session_config: dict[str, str] = field(default_factory=dict)  # add_session_config_entry
