"""``kvfarm generate``: one artifact, one prompt, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from harness.cli.output import JsonOption, show
from kvengine.artifact import Artifact
from kvengine.errors import InvalidToken
from kvengine.program import Workload
from kvengine.recipe import SessionRecipe

if TYPE_CHECKING:
    from harness.text import Tokenizer


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    artifact: Annotated[Path, typer.Argument(help="Folder that `kvfarm export` wrote.")],
    tokens: Annotated[str | None, typer.Option(help="The prompt as token ids: 5,6,7.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt as text.")] = None,
    chat: Annotated[
        str | None, typer.Option(help="What a user says, put into the checkpoint's chat template.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder with tokenizer.json.  [default: the artifact's own]"),
    ] = None,
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
    """Generate from text or token ids; report latency and memory.

    Greedy, in this process."""
    from kvengine.engine import LocalEngine

    recipe = SessionRecipe(provider=provider, provider_flags=tuple(flag or ()), threads=threads)
    ids, reader = _prompt(artifact, tokenizer, tokens, prompt, chat)
    workload = Workload(ids, max_new_tokens, repeats=1, warmup=warmup, capacity=context)
    engine = LocalEngine.open(artifact, recipe)
    try:
        measured = engine.run_workload(workload)
        notes = engine.info.notes
        end = set(engine.model.spec.eos_tokens)
    finally:
        engine.close()
    (sample,) = measured.samples
    answer = None if reader is None else reader.decode(_until(end, sample.tokens))
    data = {
        "prompt_tokens": ids,
        "tokens": sample.tokens,
        "text": answer,
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
        f"{' '.join(map(str, sample.tokens)) if answer is None else _printable(answer)}\n"
        f"time to first token {sample.ttft_ms:.1f} ms, decode {rate:.1f} tokens/s, load "
        f"{measured.load_ms:.0f} ms, {measured.threads} threads\n"
        f"KV cache {measured.kv_bytes:,} bytes, peak memory {measured.peak_rss_bytes / 2**20:,.0f} MiB"
    )
    show(as_json, data, "\n".join([text, *notes]))


def _prompt(
    artifact: Path, folder: Path | None, tokens: str | None, prompt: str | None, chat: str | None
) -> tuple[tuple[int, ...], Tokenizer | None]:
    """Token ids, and what made them if it was a tokenizer."""
    if sum(given is not None for given in (tokens, prompt, chat)) != 1:
        raise typer.BadParameter("sought one prompt: --prompt TEXT, --chat TEXT or --tokens 5,6,7")
    if tokens is not None:
        return _parse(tokens), None
    from harness.text import Tokenizer

    reader = Tokenizer.open(folder or artifact)
    if chat is not None:
        ids = reader.encode(reader.chat([{"role": "user", "content": chat}]), special=False)
    else:
        ids = reader.encode(prompt or "")
    reader.check_fits(ids, Artifact.open(artifact, verify=False).manifest.spec.vocab_size)
    return ids, reader


def _printable(text: str) -> str:
    """For a terminal: no control characters, and no brackets that rich would take for its own."""
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))


def _until(end: set[int], tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Up to the first end-of-sequence token; generation itself does not stop there, so that times compare."""
    stop = next((i for i, token in enumerate(tokens) if token in end), len(tokens))
    return tokens[:stop]


def _parse(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InvalidToken(f"--tokens {text!r}: sought whole numbers separated by commas") from None
