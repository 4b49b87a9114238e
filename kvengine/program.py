"""Programs: what a check asks of an engine, as data.

A program is generated on the host, run whole on the device in one round trip, replayed
from its JSON and shrunk by Hypothesis. ``kvengine.engine`` interprets it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvengine.bandwidth import Bandwidth
from kvengine.codec import decode, encode

# Operations on one sequence take ``row``, the batch row they act on; the other rows stay as they are.


@dataclass(frozen=True)
class Prefill:
    """Append ``tokens`` in steps of ``chunk`` (0: one shot). logits: which rows to return."""

    tokens: tuple[int, ...]
    chunk: int = 0
    logits: Literal["all", "last"] = "all"
    row: int = 0
    kind: Literal["prefill"] = "prefill"


@dataclass(frozen=True)
class Decode:
    """Append each token in a step of its own; one row of logits a step."""

    tokens: tuple[int, ...]
    row: int = 0
    kind: Literal["decode"] = "decode"


@dataclass(frozen=True)
class Generate:
    """Append ``token`` and feed greedy tokens back on the device.

    Returns the ``count`` tokens that follow ``token``; the last of them is not appended.
    """

    token: int
    count: int
    row: int = 0
    kind: Literal["generate"] = "generate"


@dataclass(frozen=True)
class Speculate:
    """As Generate, by prompt lookup: up to ``draft`` tokens that once followed the newest ``ngram`` tokens
    are verified in one step, and those rejected are rewound. Returns the same tokens as Generate.

    hint: further text to look them up in.
    """

    token: int
    count: int
    draft: int = 4
    ngram: int = 2
    row: int = 0
    hint: tuple[int, ...] = ()
    kind: Literal["speculate"] = "speculate"


@dataclass(frozen=True)
class Extend:
    """Append to several rows in the same steps: ``tokens[b]`` to row b, of any length; () leaves it idle."""

    tokens: tuple[tuple[int, ...], ...]
    chunk: int = 0
    kind: Literal["extend"] = "extend"


@dataclass(frozen=True)
class Reuse:
    """Make a row hold exactly ``tokens``: keep the longest common prefix, rewind to it, append the rest.

    The last token is always run again, for its logits; where the prefix cannot be rewound to,
    everything is.
    """

    tokens: tuple[int, ...]
    chunk: int = 0
    row: int = 0
    kind: Literal["reuse"] = "reuse"


@dataclass(frozen=True)
class Reset:
    """Forget everything, or one row, which thereby leaves the batch; keep the buffers."""

    row: int | None = None
    kind: Literal["reset"] = "reset"


@dataclass(frozen=True)
class Poison:
    """Fill every dead cache row with NaN (integer caches: the most negative code)."""

    kind: Literal["poison"] = "poison"


@dataclass(frozen=True)
class Rewind:
    """Drop the newest ``count`` tokens."""

    count: int
    row: int = 0
    kind: Literal["rewind"] = "rewind"


@dataclass(frozen=True)
class Compact:
    """Drop old tokens, but the first ``sinks`` and the newest ``keep``: an approximation.

    See Decoder.compact for what it preserves.
    """

    keep: int
    sinks: int = 0
    row: int = 0
    kind: Literal["compact"] = "compact"


@dataclass(frozen=True)
class Reorder:
    """Row i becomes what row ``order[i]`` was, as beam search does; a row may be taken more than once."""

    order: tuple[int, ...]
    kind: Literal["reorder"] = "reorder"


@dataclass(frozen=True)
class Fork:
    """Copy the state under ``name`` and go on in the original, which is called "main" at first.

    A state that ``name`` named before is forgotten.
    """

    name: str
    kind: Literal["fork"] = "fork"


@dataclass(frozen=True)
class Switch:
    """Go on in the state called ``name``; the one left stays under its own name."""

    name: str
    kind: Literal["switch"] = "switch"


@dataclass(frozen=True)
class Save:
    """Write the state to slot ``name`` on the device's disk; slots end with the program."""

    name: str
    kind: Literal["save"] = "save"


@dataclass(frozen=True)
class Load:
    """Replace the state by slot ``name``."""

    name: str
    kind: Literal["load"] = "load"


@dataclass(frozen=True)
class Damage:
    """Add one to byte ``at`` (modulo its size) of the file of slot ``name``, or cut the file off there."""

    name: str
    at: int
    cut: bool = False
    kind: Literal["damage"] = "damage"


@dataclass(frozen=True)
class ReadCache:
    """Read back what ``layer`` holds of a row: Observation.cache."""

    layer: int
    row: int = 0
    kind: Literal["read_cache"] = "read_cache"


Append = Prefill | Decode | Generate | Speculate | Extend | Reuse
Operation = (
    Append | Reset | Poison | Rewind | Compact | Reorder | Fork | Switch | Save | Load | Damage | ReadCache
)


@dataclass(frozen=True)
class Program:
    """Operations on one fresh decoder of ``batch`` rows with ``capacity`` tokens of context each.

    slack: rows above the window for windowed layers; None takes the artifact's plan.
    """

    capacity: int
    operations: tuple[Operation, ...]
    slack: int | None = None
    batch: int = 1
    version: Literal[1] = 1

    def to_json(self) -> str:
        return json.dumps(encode(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Raises kvengine.codec.DecodeError (a ValueError) for anything but a program."""
        return decode(cls, json.loads(text))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class OperationError:
    """A refusal by the engine: the class name in kvengine.errors and its message."""

    type: str
    message: str


@dataclass(frozen=True)
class CacheRows:
    """The valid cache rows of one layer and batch row, oldest first; L of them.

    positions: int64 [L], the position in the sequence that each row stands for.
    key, value: float32 [kv_heads, L, head_dim], dequantised; keys are rotated.
    key_codes, value_codes: the same as stored: float32, float16 or int8 [kv_heads, L, head_dim];
        int4: uint8 [kv_heads, L, head_dim / 2], element 2i in the low nibble of byte i, plus 8.
    key_scale, value_scale: float32 [kv_heads, head_dim]; code times scale is the element. Ones for
        float caches.
    """

    positions: npt.NDArray[np.int64]
    key: npt.NDArray[np.float32]
    value: npt.NDArray[np.float32]
    key_codes: npt.NDArray[Any]
    value_codes: npt.NDArray[Any]
    key_scale: npt.NDArray[np.float32]
    value_scale: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Observation:
    """What the engine returned for one operation.

    positions: tokens in each batch row afterwards. tokens: what Generate or Speculate produced.
    logits: float32 [rows, vocab_size] (rows may be 0): one row per token of a Prefill with
    logits="all", of a Decode, of an Extend (batch row 0's tokens first, then row 1's) and per token
    that a Reuse really ran; one row for logits="last"; none otherwise.
    cache: what ReadCache read.
    An operation that failed has ``error`` set and no rows.
    """

    positions: tuple[int, ...]
    logits: npt.NDArray[np.float32]
    tokens: tuple[int, ...] = ()
    error: OperationError | None = None
    cache: CacheRows | None = None

    @property
    def position(self) -> int:
        """Tokens in the longest row."""
        return max(self.positions)


@dataclass(frozen=True)
class Workload:
    """What a leg measures: one prompt of ``prompt`` tokens, then ``new_tokens`` greedy tokens, repeated.

    capacity: tokens of context to allocate; None is just enough.
    context: tokens that are in the cache before the prompt comes; to put them there is not timed.
    slowdown, ballast_bytes: injected by a calibration, to see whether the gate finds them. After each
    step the engine spins for this share of the step's own time; so many bytes are held and touched.
    bandwidth: measure afterwards how fast the device reads memory.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    repeats: int = 3
    warmup: int = 1
    chunk: int = 0
    capacity: int | None = None
    context: tuple[int, ...] = ()
    slowdown: float = 0.0
    ballast_bytes: int = 0
    bandwidth: bool = False


@dataclass(frozen=True)
class Sample:
    """One repeat. ttft_ms: prefill call to first token on the host. itl_ms: one gap per further token."""

    ttft_ms: float
    itl_ms: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Measurement:
    """Raw samples of one leg and what the process weighed."""

    samples: tuple[Sample, ...]
    load_ms: float
    peak_rss_bytes: int
    kv_bytes: int
    nodes_by_provider: dict[str, int]
    threads: int
    # When its generations began and ended, the unrecorded ones included: s since the device's boot, time
    # asleep included; 0 where the system does not tell.
    began_s: float = 0.0
    ended_s: float = 0.0
    bandwidth: Bandwidth | None = None  # where it was asked for and could be measured
