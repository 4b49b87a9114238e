"""Our engine beside onnxruntime-genai: the same checkpoint, int4, threads, prompt and number of tokens.

    python -m bench.genai --model CHECKPOINT

Every engine lives in a process of its own and they take turns: A B C D A B C D ... The tables go to
stdout with one line of JSON last, progress to stderr. Exit code: 0 all targets met, 1 one missed or
the machine too busy to tell, 2 the benchmark could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvengine
from bench import baseline
from bench.ceiling import buffer_bytes, last_level_cache, read_bandwidth, tokens_per_second, weight_bytes
from bench.contestants import Contestant, GenaiEngine, OurEngine, Run, TorchReference
from bench.errors import BenchError
from bench.quiet import QUIET
from bench.results import Bench, Engine, Target, agreement, ceiling_text, json_line, table_text
from harness.artifacts import artifact_for
from harness.errors import HarnessError
from kvengine.errors import KvEngineError
from kvengine.plan import CachePlan
from kvengine.recipe import ExportRecipe

BLOCK, BEST_BLOCK = 32, 128  # genai's default, and ours that is fastest on CPUs
OURS, THEIRS = f"kvfarm int4/{BLOCK}", f"genai int4/{BLOCK}"
OURS_BEST, THEIRS_BEST = f"kvfarm int4/{BEST_BLOCK}", f"genai int4/{BEST_BLOCK}"

TARGETS = (
    Target("first token, equal block, ours / genai", "ttft_ms", OURS, THEIRS, at_most=0.70),
    Target("tokens/s, equal block, ours / genai", "tokens_per_second", OURS, THEIRS, at_least=1.00),
    Target("tokens/s, our best / genai's default", "tokens_per_second", OURS_BEST, THEIRS, at_least=1.10),
    Target("first token, block 128 each", "ttft_ms", OURS_BEST, THEIRS_BEST),
    Target("tokens/s, block 128 each", "tokens_per_second", OURS_BEST, THEIRS_BEST),
)


@dataclass(frozen=True)
class Entry:
    """A built contestant, not yet started."""

    name: str
    block_size: int
    graph: Path
    start: tuple[object, ...]  # arguments of Contestant after its name


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        bench = _bench(options)
    except (BenchError, HarnessError, KvEngineError) as error:
        _say(f"error: {error}")
        return 2
    _out(table_text(bench))
    _out(json_line(bench))
    return 0 if all(bench.met(target) for target in bench.targets if target.bound != "-") else 1


def _bench(options: argparse.Namespace) -> Bench:
    entries = _build(options)
    _say("measuring how fast memory reads")
    bandwidth = read_bandwidth(options.threads, buffer_bytes(last_level_cache()))
    prompt = _prompt(options)
    _say("logits of the float32 reference")
    with Contestant("reference", TorchReference, str(options.model), options.threads) as oracle:
        reference = oracle.logits(prompt)
    with ExitStack() as stack:
        _say("loading")
        contestants = [stack.enter_context(Contestant(entry.name, *entry.start)) for entry in entries]
        agreements = [agreement(contestant.logits(prompt), reference) for contestant in contestants]
        engines = []
        for entry, contestant, (correlation, top1) in zip(entries, contestants, agreements, strict=True):
            size = weight_bytes(entry.graph)
            ceiling = tokens_per_second(bandwidth, size)
            engines.append(
                Engine(entry.name, entry.block_size, size, ceiling, contestant.load_ms, 0, correlation, top1, ())
            )
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main())
