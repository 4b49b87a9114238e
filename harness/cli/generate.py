"""``kvfarm generate``: one artifact, one prompt, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.output import JsonOption, show
from kvengine.errors import InvalidToken
from kvengine.program import Workload
from kvengine.recipe import SessionRecipe


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    artifact: Annotated[Path, typer.Argument(help="Folder that `kvfarm export` wrote.")],
    tokens: Annotated[str, typer.Option(help="The prompt as token ids: 5,6,7.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate, greedily.", min=1)] = 32,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context to allocate.  [default: just enough]", min=1)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Intra-op threads.  [default: chosen for this machine]", min=1)
    ] = None,
    provider: Annotated[
        str, typer.Option(help="Execution provider: cpu, xnnpack, nnapi, qnn, cuda.")
    ] = "cpu",
    flag: Annotated[list[str] | None, typer.Option(help="Provider flag, e.g. USE_FP16; repeatable.")] = None,
    warmup: Annotated[int, typer.Option(help="Unrecorded generations before the one reported.", min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Generate from token ids; report latency and memory.

    Greedy, in this process."""
    from kvengine.engine import LocalEngine

    recipe = SessionRecipe(provider=provider, provider_flags=tuple(flag or ()), threads=threads)
    workload = Workload(_parse(tokens), max_new_tokens, repeats=1, warmup=warmup, capacity=context)
    engine = LocalEngine.open(artifact, recipe)
    try:
        measured = engine.run_workload(workload)
        notes = engine.info.notes
    finally:
        engine.close()
    (sample,) = measured.samples
    data = {
        "tokens": sample.tokens,
        "ttft_ms": sample.ttft_ms,
        "itl_ms": sample.itl_ms,
        "kv_bytes": measured.kv_bytes,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "load_ms": measured.load_ms,
        "threads": measured.threads,
        "nodes_by_provider": measured.nodes_by_provider,
        "notes": notes,
    }
    rate = 1e3 * len(sample.itl_ms) / sum(sample.itl_ms) if sample.itl_ms else 0.0
    text = (
        f"{' '.join(map(str, sample.tokens))}\n"
        f"time to first token {sample.ttft_ms:.1f} ms, decode {rate:.1f} tokens/s, load "
        f"{measured.load_ms:.0f} ms, {measured.threads} threads\n"
        f"KV cache {measured.kv_bytes:,} bytes, peak memory {measured.peak_rss_bytes / 2**20:,.0f} MiB"
    )
    show(as_json, data, "\n".join([text, *notes]))


def _parse(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InvalidToken(f"--tokens {text!r}: sought whole numbers separated by commas") from None
