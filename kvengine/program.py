"""Programs: what a check asks of an engine, as data.

A program is generated on the host, run whole on the device in one round trip, replayed
from its JSON and shrunk by Hypothesis. ``kvengine.engine`` interprets it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvengine.codec import decode, encode


@dataclass(frozen=True)
class Prefill:
    """Append ``tokens`` in steps of ``chunk`` (0: one shot). logits: which rows to return."""

    tokens: tuple[int, ...]
    chunk: int = 0
    logits: Literal["all", "last"] = "all"
    kind: Literal["prefill"] = "prefill"


@dataclass(frozen=True)
class Decode:
    """Append each token in a step of its own; one row of logits a step."""

    tokens: tuple[int, ...]
    kind: Literal["decode"] = "decode"


@dataclass(frozen=True)
class Generate:
    """Append ``token`` and feed greedy tokens back on the device.

    Returns the ``count`` tokens that follow ``token``; the last of them is not appended.
    """

    token: int
    count: int
    kind: Literal["generate"] = "generate"


@dataclass(frozen=True)
class Reset:
    """Forget everything, keep the buffers."""

    kind: Literal["reset"] = "reset"


@dataclass(frozen=True)
class Poison:
    """Fill every dead cache row with NaN (integer caches: the most negative code)."""

    kind: Literal["poison"] = "poison"


@dataclass(frozen=True)
class Rewind:
    """Drop the newest ``count`` tokens."""

    count: int
    kind: Literal["rewind"] = "rewind"


@dataclass(frozen=True)
class Fork:
    """Copy the current state under ``name`` and go on in the original."""

    name: str
    kind: Literal["fork"] = "fork"


@dataclass(frozen=True)
class Switch:
    """Go on in the state called ``name``."""

    name: str
    kind: Literal["switch"] = "switch"


@dataclass(frozen=True)
class Save:
    """Write the state to slot ``name`` on the device's disk."""

    name: str
    kind: Literal["save"] = "save"


@dataclass(frozen=True)
class Load:
    """Replace the state by slot ``name``."""

    name: str
    kind: Literal["load"] = "load"


Operation = Prefill | Decode | Generate | Reset | Poison | Rewind | Fork | Switch | Save | Load


@dataclass(frozen=True)
class Program:
    """Operations on one fresh decoder with ``capacity`` tokens of context.

    slack: rows above the window for windowed layers; None takes the artifact's plan.
    """

    capacity: int
    operations: tuple[Operation, ...]
    slack: int | None = None
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
class Observation:
    """What the engine returned for one operation.

    position: tokens in the cache afterwards. tokens: what Generate produced.
    logits: float32 [rows, vocab_size] (rows may be 0): one row per token of a Prefill with
    logits="all" or a Decode, one row for logits="last", none otherwise.
    An operation that failed has ``error`` set and no rows.
    """

    position: int
    logits: npt.NDArray[np.float32]
    tokens: tuple[int, ...] = ()
    error: OperationError | None = None


@dataclass(frozen=True)
class Workload:
    """What a leg measures: one prompt of ``prompt`` tokens, then ``new_tokens`` greedy tokens, repeated.

    capacity: tokens of context to allocate; None is just enough.
    slowdown, ballast_bytes: injected by a calibration, to see whether the gate finds them. After each
    step the engine spins for this share of the step's own time; so many bytes are held and touched.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    repeats: int = 3
    warmup: int = 1
    chunk: int = 0
    capacity: int | None = None
    slowdown: float = 0.0
    ballast_bytes: int = 0


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
