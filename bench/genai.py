"""Our engine beside onnxruntime-genai: the same checkpoint, int4, threads, prompt and number of tokens.

    python -m bench.genai --model CHECKPOINT

Every engine lives in a process of its own and they take turns: A B C D A B C D ... The tables go to
stdout with one line of JSON last, progress to stderr. Exit code: 0 all targets met, 1 one missed or
the machine too busy to tell, 2 the benchmark could not run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import kvengine
from bench import baseline
from bench.ceiling import buffer_bytes, last_level_cache, read_bandwidth, tokens_per_second, weight_bytes
from bench.contestants import Contestant, Engine, GenaiEngine, OurEngine, Run, TorchReference
from bench.errors import BenchError
from bench.quiet import QUIET
from bench.results import Bench, Standing, Target, agreement, ceiling_text, json_line, table_text
from harness.artifacts import artifact_for
from harness.errors import HarnessError
from kvengine.errors import KvEngineError
from kvengine.plan import CachePlan
from kvengine.recipe import ExportRecipe

BLOCK: Literal[32] = 32  # genai's default
BEST_BLOCK: Literal[128] = 128  # the fewest bytes a token
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
    """A built contestant, not yet started. make: with ``arguments``, its Engine."""

    name: str
    block_size: int
    graph: Path
    make: Callable[..., Engine]
    arguments: tuple[object, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        bench = _bench(options)
    except (BenchError, HarnessError, KvEngineError) as error:
        _say(f"error: {error}")
        return 2
    _out(table_text(bench))
    _out(json_line(bench))
    return 0 if all(bench.met(target) for target in bench.targets if target.bound) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.genai", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder (Gemma 3 text)")
    parser.add_argument("--work", type=Path, default=Path(".kvfarm/bench"), help="where builds are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="quiet rounds wanted")
    parser.add_argument("--max-rounds", type=int, default=21, help="rounds to try for them")
    return parser


def _bench(options: argparse.Namespace) -> Bench:
    entries = _build(options)
    _say("measuring how fast memory is read")
    bandwidth = read_bandwidth(options.threads, buffer_bytes(last_level_cache()))
    sizes = {entry.name: weight_bytes(entry.graph) for entry in entries}
    _out(ceiling_text(bandwidth, options.threads, sizes))
    prompt = _prompt(options)
    _say("logits of the float32 reference")
    with Contestant("reference", TorchReference, str(options.model), options.threads) as oracle:
        reference = oracle.logits(prompt)
    with ExitStack() as stack:
        contestants = []
        for entry in entries:  # one after the other, so that load times are not shared
            _say(f"loading {entry.name}")
            contestants.append(stack.enter_context(Contestant(entry.name, entry.make, *entry.arguments)))
        agreements = [agreement(contestant.logits(prompt), reference) for contestant in contestants]
        rounds = _rounds(contestants, prompt, options)
        peaks = [contestant.peak_rss_bytes() for contestant in contestants]
    standings = tuple(
        Standing(
            name=entry.name,
            block_size=entry.block_size,
            weight_bytes=sizes[entry.name],
            ceiling=tokens_per_second(bandwidth, sizes[entry.name]),
            load_ms=contestants[i].load_ms,
            peak_rss_bytes=peaks[i],
            correlation=agreements[i][0],
            top1=agreements[i][1],
            runs=tuple(runs[i] for runs in rounds),
        )
        for i, entry in enumerate(entries)
    )
    return Bench(_machine(options), _settings(options), bandwidth, standings, TARGETS, options.rounds)


def _build(options: argparse.Namespace) -> list[Entry]:
    """Everything installed and exported; only what is missing is made."""
    checkpoint = options.model.resolve()
    _say("installing onnxruntime-genai")
    packages = baseline.install(options.work.resolve() / "packages")
    window = json.loads((checkpoint / "config.json").read_text())["sliding_window"]
    entries = []
    blocks: tuple[Literal[32, 128], ...] = (BLOCK, BEST_BLOCK)
    for block in blocks:
        _say(f"exporting kvfarm int4/{block}")
        recipe = ExportRecipe("int4", block, cache=CachePlan("hybrid", "float32", slack=32))
        artifact = artifact_for(checkpoint, recipe, options.work)
        ours = (str(artifact.folder), options.threads)
        entries.append(Entry(f"kvfarm int4/{block}", block, artifact.model_path, OurEngine, ours))
        _say(f"building genai int4/{block} (its builder takes a minute or two)")
        choices = {} if block == BLOCK else {"block_size": str(block)}
        folder = baseline.build(packages, checkpoint, options.work.resolve() / f"genai-{block}", choices)
        theirs = (str(folder), options.threads, str(packages), window)
        entries.append(Entry(f"genai int4/{block}", block, folder / "model.onnx", GenaiEngine, theirs))
    return entries


def _rounds(
    contestants: list[Contestant], prompt: list[int], options: argparse.Namespace
) -> list[tuple[Run, ...]]:
    """Rounds until enough were quiet, or the most that were asked for. The first, unrecorded, warms up."""
    rounds: list[tuple[Run, ...]] = []
    quiet = 0
    started = time.monotonic()
    for attempt in range(1 + options.max_rounds):
        runs = tuple(contestant.run(prompt, options.new_tokens) for contestant in contestants)
        if attempt:
            rounds.append(runs)
            quiet += all(run.elsewhere <= QUIET for run in runs)
        if quiet >= options.rounds:
            break
        each = (time.monotonic() - started) / (attempt + 1)
        left = each * min(options.rounds - quiet, options.max_rounds - attempt)
        busiest = max(run.elsewhere for run in runs)
        _say(
            f"round {attempt} of at most {options.max_rounds}, {quiet} of {options.rounds} quiet "
            f"(others used {busiest:.0%} of the CPUs), about {left:.0f} s left"
        )
    return rounds


def _prompt(options: argparse.Namespace) -> list[int]:
    """Seeded random ids, none of them special (Gemma's are 0 to 2)."""
    config = json.loads((options.model / "config.json").read_text())
    ids = np.random.default_rng(0).integers(3, config["vocab_size"], options.prompt)
    return [int(token) for token in ids]


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.machine(),
        "cpus": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache(),
        "python": platform.python_version(),
        "kvfarm": kvengine.__version__,
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "onnxruntime_genai": baseline.version(options.work / "packages"),
    }


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": options.model.name,
        "threads": options.threads,
        "prompt": options.prompt,
        "new_tokens": options.new_tokens,
    }


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _out(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
