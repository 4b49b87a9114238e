"""What a decoder model looks like, as plain numbers: read from ``config.json``, kept in the artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: slow frequencies are divided by ``factor``, fast ones stay, those between are blended.

    A frequency is slow when it turns less than ``low`` times within ``original`` tokens, fast when
    more than ``high`` times.
    """

    factor: float
    low: float
    high: float
    original: int  # tokens
    kind: Literal["llama3"] = "llama3"


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): as Llama 3.1's in spirit, blended linearly over the channels.

    ``slow`` and ``fast`` are beta_slow and beta_fast: turns within ``original`` tokens.
    """

    factor: float
    slow: float
    fast: float
    original: int  # tokens
    truncate: bool = True  # the blend begins and ends at whole channels
    kind: Literal["yarn"] = "yarn"


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753) within the original context: each frequency divided by its own factor."""

    factors: tuple[float, ...]
    kind: Literal["longrope"] = "longrope"


@dataclass(frozen=True)
class RopeSpec:
    """One rotary table: ``angle[p, j] = p / factor * theta ** (-2 j / rotary_dim)``, then ``scaling``."""

    theta: float
    factor: float = 1.0  # linear scaling of positions; 1.0 is none
    rotary_dim: int | None = None  # leading channels of a head that rotate; None: all
    magnitude: float = 1.0  # multiplies cos and sin (YaRN's and LongRoPE's attention factor)
    scaling: Llama3Scaling | YarnScaling | LongRopeScaling | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One transformer layer as the cache sees it.

    ``window`` counts the current token: a query at position p sees keys p-window+1 .. p
    (Hugging Face's meaning of ``sliding_window``). None is full attention.
    """

    window: int | None
    rope: int | None  # index into ModelSpec.ropes; None: no rotary embedding (SmolLM3's NoPE layers)
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
    # Tokens. Of a LongRoPE model the original context: beyond it every key in the cache would have to
    # be rotated anew by other factors.
    max_position: int
    attention_scale: float  # multiplies Q K^T
    norm_eps: float
    tied_head: bool
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    eos_tokens: tuple[int, ...] = ()

    def rotary_dim(self, rope: int) -> int:
        """Channels of a head that the rotary table ``rope`` turns."""
        return self.ropes[rope].rotary_dim or self.head_dim_of(rope)

    def head_dim_of(self, rope: int) -> int:
        """head_dim of the layers that use the rotary table ``rope``."""
        return next(layer.head_dim for layer in self.layers if layer.rope == rope)
