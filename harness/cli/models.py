"""``kvfarm synth``, ``export`` and ``memory``: checkpoints, artifacts and what their caches weigh."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from harness.cli.output import JsonOption, progress, show
from harness.recipes import DEFAULT_SLACK
from kvengine.artifact import MANIFEST, Artifact
from kvengine.errors import CheckpointError, RecipeError
from kvengine.plan import CacheDtype, CachePlan, PlanKind
from kvengine.recipe import ExportRecipe, Weights
from kvengine.spec import ModelSpec

MIB = 1 << 20


def register(app: typer.Typer) -> None:
    app.command()(synth)
    app.command()(export)
    app.command()(memory)


def synth(
    preset: Annotated[str, typer.Argument(help="A preset: tiny-gemma3, tiny-llama, gemma-3-1b, ...")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write; default: PRESET.")
    ] = Path(),
    seed: Annotated[int, typer.Option(help="Another seed, other weights.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make up a Hugging Face checkpoint, without any download."""
    from harness import synth as maker

    folder = Path(preset) if output == Path() else output
    with progress() as report:
        maker.synth(preset, folder, seed=seed, progress=lambda done, total: report("weights", done, total))
    size = sum(file.stat().st_size for file in folder.iterdir())
    data = {"checkpoint": str(folder), "preset": preset, "seed": seed, "bytes": size}
    show(as_json, data, f"{folder}: {preset}, seed {seed}, {size / MIB:,.1f} MiB")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder: config.json and *.safetensors.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artifact to write.")],
    weights: Annotated[Weights, typer.Option(help="Storage of the weight matrices.")] = "float32",
    cache: Annotated[
        PlanKind,
        typer.Option(
            help="growing: concatenated each step; static: full length, one buffer; "
            "hybrid: local layers hold their window only."
        ),
    ] = "hybrid",
    cache_dtype: Annotated[CacheDtype, typer.Option(help="Element type of the KV cache.")] = "float32",
    block_size: Annotated[
        int, typer.Option(help="Weights that share one scale (int8, int4): 32, 64, 128.")
    ] = 32,
    slack: Annotated[
        int | None,
        typer.Option(help=f"Rows above the window of a hybrid cache.  [default: {DEFAULT_SLACK}]", min=0),
    ] = None,
    activations: Annotated[
        typing.Literal["float32", "float16"], typer.Option(help="Element type between the operators.")
    ] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint to an ONNX artifact.

    Needs no torch; weights are streamed."""
    from kvengine.export import export as export_checkpoint

    if slack is not None and cache != "hybrid":
        raise RecipeError(f"--slack {slack}: rows above a window; a {cache} cache has none")
    rows = (DEFAULT_SLACK if slack is None else slack) if cache == "hybrid" else 0
    if block_size not in (32, 64, 128):
        raise RecipeError(f"--block-size {block_size}: sought one of 32, 64, 128")
    size = typing.cast(typing.Literal[32, 64, 128], block_size)
    recipe = ExportRecipe(weights, size, activations, CachePlan(cache, cache_dtype, rows))
    with progress() as report:
        artifact = export_checkpoint(checkpoint, output, recipe, progress=report)
    manifest = artifact.manifest
    total = sum(blob.size for blob in manifest.blobs)
    data = {
        "artifact": str(output),
        "id": artifact.id,
        "bytes": total,
        "recipe": manifest.recipe,
        "calibration": manifest.calibration,
        "checkpoint_sha256": manifest.checkpoint_sha256,
    }
    show(as_json, data, f"{output}: artifact {artifact.id[:16]}, {total / MIB:,.1f} MiB")


def memory(
    model: Annotated[str, typer.Argument(help="A preset's name, a checkpoint folder or an artifact folder.")],
    context: Annotated[int, typer.Option(help="Tokens of context to hold.", min=1)] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences held at the same time.", min=1)] = 1,
    slack: Annotated[
        int, typer.Option(help="Rows above the window of the hybrid plans.", min=0)
    ] = DEFAULT_SLACK,
    as_json: JsonOption = False,
) -> None:
    """Say to the byte what a model's KV cache weighs.

    Under every cache plan, and for an artifact under its own."""
    name, spec, own = _geometry(model)
    rows = [_plan_row(title, s, plan, context, batch) for title, s, plan in _plans(spec, slack)]
    data: dict[str, Any] = {"model": name, "context": context, "batch": batch, "plans": rows}
    table = Table("cache plan", "KV heads", "bytes", "MiB", title=f"{name}, {context:,} tokens of context")
    if own is not None:
        data["artifact"] = _plan_row(f"this artifact: {_title(own)}", spec, own, context, batch)
    for row in [*rows, *([data["artifact"]] if own else [])]:
        table.add_row(row["name"], str(row["kv_heads"]), f"{row['bytes']:,}", f"{row['mib']:,.2f}")
    show(as_json, data, table)


def _plans(spec: ModelSpec, slack: int) -> list[tuple[str, ModelSpec, CachePlan]]:
    """The plans worth comparing, from the one that caches every query head down."""
    every_head = dataclasses.replace(
        spec, layers=tuple(dataclasses.replace(layer, kv_heads=spec.num_heads) for layer in spec.layers)
    )
    dtypes: tuple[CacheDtype, ...] = ("float32", "float16", "int8", "int4")
    plans = [CachePlan("static", dtype) for dtype in dtypes]
    plans += [CachePlan("hybrid", dtype, slack) for dtype in dtypes]
    return [
        (f"static, float32, MHA: {spec.num_heads} KV heads", every_head, CachePlan("static")),
        *((_title(plan), spec, plan) for plan in plans),
    ]


def _title(plan: CachePlan) -> str:
    return f"{plan.kind}, {plan.dtype}" + (f", slack {plan.slack}" if plan.kind == "hybrid" else "")


def _plan_row(title: str, spec: ModelSpec, plan: CachePlan, context: int, batch: int) -> dict[str, Any]:
    size = plan.total_bytes(spec, context, batch)
    heads = max(layer.kv_heads for layer in spec.layers)
    return {
        "name": title,
        "cache": plan.kind,
        "dtype": plan.dtype,
        "slack": plan.slack,
        "kv_heads": heads,
        "bytes": size,
        "mib": size / MIB,
    }


def _geometry(model: str) -> tuple[str, ModelSpec, CachePlan | None]:
    """Name, spec and (of an artifact) cache plan of what ``model`` names; a folder wins over a preset.

    Raises:
        CheckpointError: neither a folder with a model nor a preset.
    """
    from harness.presets import PRESETS
    from kvengine.export import load_spec

    folder = Path(model)
    if (folder / MANIFEST).is_file():
        manifest = Artifact.open(folder, verify=False).manifest
        return folder.name, manifest.spec, manifest.recipe.cache
    config = folder / "config.json"
    if config.is_file():
        try:
            return folder.name, load_spec(json.loads(config.read_text())), None
        except ValueError as error:
            raise CheckpointError(f"{config} is not JSON: {error}") from error
    if model in PRESETS:
        return model, load_spec(PRESETS[model].config), None
    raise CheckpointError(
        f"sought {model!r}: no {MANIFEST} or config.json in such a folder, and no such preset; "
        f"presets are {', '.join(PRESETS)}"
    )
