"""``kvfarm ablate``: one optimisation after the other, from the naive decoder to the full engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from harness.cli.options import AddressOption, FarmOption, StoreOption
from harness.cli.output import Console, JsonOption, show
from kvengine.recipe import Weights

if TYPE_CHECKING:
    from harness.ablation.run import AblationOptions
    from reports.results import RunResults


def register(app: typer.Typer) -> None:
    app.command()(ablate)


def ablate(
    model: Annotated[
        Path | None, typer.Argument(help="Hugging Face checkpoint folder, see `kvfarm synth`.")
    ] = None,
    devices: Annotated[
        str, typer.Option(help="host, farm (all), or names of devices and pools: NAME,NAME.")
    ] = "host",
    weights: Annotated[
        Weights, typer.Option(help="Storage of the weight matrices, the same before and after.")
    ] = "int4",
    unquantised: Annotated[
        bool, typer.Option(help="Also measure the full engine with float32 weights.")
    ] = True,
    prompt: Annotated[int, typer.Option(help="Prompt length, tokens.", min=1)] = 960,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 64,
    depth: Annotated[int, typer.Option(help="Tokens in the cache before the prompt.", min=0)] = 0,
    rounds: Annotated[
        int, typer.Option(help="Legs of each step, each a process of its own; even is best.", min=1)
    ] = 4,
    repeats: Annotated[
        int, typer.Option(help="Recorded generations a leg, after one for warming up.", min=1)
    ] = 1,
    energy: Annotated[
        bool, typer.Option("--energy", help="Also measure energy on phones: minutes a step.")
    ] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the report to write.")] = Path(
        "ablation"
    ),
    again: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Measure nothing: write the report of a stored run again."),
    ] = None,
    store: StoreOption = None,
    seed: Annotated[int, typer.Option(help="Of the prompt.", min=0)] = 0,
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn on one optimisation at a time and say what each is worth.

    From the naive decoder to the full engine, beside the figures that the seed report published."""
    from harness.ablation.report import summary, tables, write
    from harness.ablation.run import AblationOptions
    from harness.measuring import Shape
    from harness.store import DEFAULT_STORE

    where = store or str(DEFAULT_STORE)
    if again is not None:
        results = _stored(where, again)
    elif model is None:
        raise typer.BadParameter("sought a checkpoint folder to measure, or --again RUN; found neither")
    else:
        results = _measured(
            AblationOptions(
                devices=devices,
                model=model.resolve(),
                store=where,
                farm=farm_file,
                farm_address=farm_address,
                weights=weights,
                unquantised=unquantised,
                shape=Shape(prompt, new_tokens, depth),
                rounds=rounds,
                repeats=repeats,
                energy=energy,
                seed=seed,
                command=("kvfarm", *sys.argv[1:]),
            )
        )
    page = write(results, output)
    data: dict[str, Any] = {"report": str(page), "run_id": results.run_id, **summary(results)}
    show(as_json, data, tables(results, page))
    raise typer.Exit(0 if len(results.legs) == results.planned_legs else 1)


def _measured(options: AblationOptions) -> RunResults:
    """The ablation, with progress and time left on stderr."""
    from harness.ablation.run import ablate as measure

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        legs = bar.add_task("preparing", total=None)
        current = ["preparing"]

        def on_leg(what: str, done: int, total: int) -> None:
            current[0] = what
            bar.update(legs, description=what, completed=done, total=total)

        def on_step(stage: str, done: int, total: int) -> None:
            share = f"{stage} {100 * done // total} %" if total else stage
            # What follows a stage that is done is the measuring itself, which tells no steps.
            bar.update(legs, description=current[0] if total and done >= total else f"{current[0]}, {share}")

        return measure(options, on_step, on_leg)


def _stored(store: str, run_id: str) -> RunResults:
    from harness.errors import StoreError
    from harness.store import open_store

    with open_store(store) as results_store:
        results = results_store.results(run_id)
    if results.ablation is None:
        raise StoreError(
            f"sought an ablation, run {run_id} is none; `kvfarm report {run_id}` writes its report"
        )
    return results
