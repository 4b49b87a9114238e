"""Distributions that were recorded from real devices, as quantiles (recorded.json), and draws from them.

``python -m bench.record`` writes the file and says in it where each number comes from.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise

from device_agents.errors import NoSuchDevice
from kvengine.codec import decode

FILE = "recorded.json"


@dataclass(frozen=True)
class Quantiles:
    """values[i]: the quantile at (i + 1/2) / len(values). count: how many were recorded."""

    values: tuple[float, ...]
    count: int

    def draw(self, random: random.Random) -> float:
        """By the inverse of the distribution function, linear between quantiles; nothing beyond them."""
        at = random.random() * (len(self.values) - 1)
        low = min(int(at), len(self.values) - 2)
        below, above = self.values[low], self.values[low + 1]
        return below + (at - low) * (above - below)

    @property
    def mean(self) -> float:
        return sum((a + b) / 2 for a, b in pairwise(self.values)) / (len(self.values) - 1)


@dataclass(frozen=True)
class Recorded:
    """One kind of device. Seconds, but where the name says ms or bytes.

    ttft_ms: of a prompt of ``prompt`` tokens. program_s: of one program of the correctness suite, answer
    included. calls, failures: how many calls were recorded, and how many infrastructure stopped.
    """

    what: str
    prompt: int
    open_s: Quantiles
    program_s: Quantiles
    load_ms: Quantiles
    ttft_ms: Quantiles
    itl_ms: Quantiles
    peak_rss_bytes: Quantiles
    kv_bytes: int
    calls: int
    failures: int
    ram_bytes: int
    cores: int
    abi: str

    @property
    def failure_rate(self) -> float:
        return self.failures / self.calls


@dataclass(frozen=True)
class Recording:
    """The file. provenance: commit, date, machine, versions, and the command that recorded it."""

    provenance: dict[str, str]
    kinds: dict[str, Recorded]

    def of(self, kind: str) -> Recorded:
        """Raises NoSuchDevice."""
        if kind not in self.kinds:
            raise NoSuchDevice(f"sought recorded latencies of {', '.join(self.kinds)}, found {kind!r}")
        return self.kinds[kind]


@cache
def recording() -> Recording:
    """What comes with kvfarm."""
    text = (resources.files(__package__) / FILE).read_text()
    return decode(Recording, json.loads(text), FILE)
