"""``kvfarm inspect``: the cache contract of an ONNX model that somebody else exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from harness.cli.output import JsonOption, show
from kvengine.contract import Contract, LayerContract
from kvengine.errors import RecipeError

if TYPE_CHECKING:
    from kvengine.export.foreign import Inspection


def register(app: typer.Typer) -> None:
    app.command()(inspect)


def inspect(
    model: Annotated[Path, typer.Argument(help="An ONNX file, of whatever exporter.")],
    answers: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Say what the graph does not; repeatable."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--model", help="Its Hugging Face checkpoint, whose config.json answers too."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Infer how an ONNX decoder wants its KV cache.

    What the graph does not say is asked for by name, never guessed; exit code 1 while anything is, and
    where graph and checkpoint contradict each other. The model is read, not run."""
    from kvengine.export.foreign import contradictions, inspect_model, stated_by

    told = {**(stated_by(checkpoint) if checkpoint else {}), **_pairs(answers or [])}
    found = inspect_model(model, told)
    contract = found.contract
    against = contradictions(checkpoint, contract) if checkpoint and contract else []
    data: dict[str, Any] = {
        "model": str(model),
        "complete": contract is not None,
        "contract": contract,
        "layers": found.found,
        "weights": found.weights,
        "data_files": found.file.data,
        "questions": found.questions,
        "contradictions": against,
    }
    show(
        as_json, data, Group(*_text(model, found), *(f"contradicts {checkpoint}: {each}" for each in against))
    )
    if contract is None or against:
        raise typer.Exit(1)


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if wrong := next((key for key, equals, value in pairs if not (key and equals and value)), None):
        raise RecipeError(f"--set {wrong}: sought KEY=VALUE such as past.layout=bnsh")
    return {key: value for key, _, value in pairs}


def _text(model: Path, found: Inspection) -> list[RenderableType]:
    contract = found.contract
    convention = contract.convention if contract else "not all of it is clear"
    lines: list[RenderableType] = [f"{model}: {convention}, {found.weights} weights", _layers(found)]
    if contract:
        lines += [_inputs(contract), f"logits: {contract.logits}, of {_rows(contract)}", *contract.notes]
    if found.questions:
        table = Table("say", "because", title="What the graph does not say")
        for question in found.questions:
            table.add_row(f"--set {question.key}=…", question.why)
        lines.append(table)
    return lines


def _layers(found: Inspection) -> Table:
    titles = (
        "layer",
        "past → present",
        "axes",
        "KV heads",
        "head_dim",
        "dtype",
        "kind",
        "window",
        "written by",
    )
    table = Table(*titles, title="KV cache")
    for number, layer in enumerate(found.found):
        if layer is None:
            table.add_row(str(number), "not clear yet", *["?"] * 7)
            continue
        names = f"{layer.past_key} → {layer.present_key}\n{layer.past_value} → {layer.present_value}"
        sizes = (layer.layout, str(layer.kv_heads), str(layer.head_dim), layer.dtype)
        # GroupQueryAttention says by an attribute that there is none; a mask says nothing.
        unsaid = "none" if layer.writer == "GroupQueryAttention" else "not said"
        window = unsaid if layer.window is None else str(layer.window)
        table.add_row(str(number), names, *sizes, _kind(layer), window, layer.writer)
    return table


def _kind(layer: LayerContract) -> str:
    """With how it is bound."""
    if layer.kind == "growing":
        return "growing, handed over"
    rows = "" if layer.rows is None else f" of {layer.rows} rows"
    return f"{layer.kind}{rows}, {'shared buffer' if layer.shared else 'two buffers'}"


def _inputs(contract: Contract) -> Table:
    table = Table("input", "is fed", "dtype", "axes", title="Inputs beside the cache")
    for entry in contract.inputs:
        role = entry.role + (f", of {entry.rows} rows" if entry.rows else "")
        table.add_row(entry.name, role, entry.dtype, str(entry.rank))
    return table


def _rows(contract: Contract) -> str:
    which = "every token" if contract.logits_rows == "all" else "a step's last token only"
    return which + (f", vocabulary {contract.vocab_size:,}" if contract.vocab_size else "")
