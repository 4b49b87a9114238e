"""What a decoder model looks like, as plain numbers: read from ``config.json``, kept in the artifact."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """One rotary table: ``angle[p, j] = p / factor * theta ** (-2 j / head_dim)``."""

    theta: float
    factor: float = 1.0  # linear scaling of positions; 1.0 is none


@dataclass(frozen=True)
class LayerSpec:
    """One transformer layer as the cache sees it.

    ``window`` counts the current token: a query at position p sees keys p-window+1 .. p
    (Hugging Face's meaning of ``sliding_window``). None is full attention.
    """

    window: int | None
    rope: int  # index into ModelSpec.ropes
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelSpec:
    """The geometry of a decoder, enough to size caches and to check requests."""

    family: str  # Hugging Face model_type, e.g. "gemma3_text"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    max_position: int  # tokens
    attention_scale: float  # multiplies Q K^T
    norm_eps: float
    tied_head: bool
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    eos_tokens: tuple[int, ...] = ()
