"""``kvfarm replay``: what failed, checked again on one device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.options import AddressOption, FarmOption
from harness.cli.output import JsonOption, Report, note, progress, show
from harness.errors import HarnessError, InventoryError
from kvengine.program import Observation, Program

if TYPE_CHECKING:
    from harness.cases import Case
    from harness.replaying import Replayed
    from harness.run import DeviceRun


def register(app: typer.Typer) -> None:
    app.command()(replay)


def replay(
    failure: Annotated[
        str, typer.Argument(help="The JSON that a failure printed or saved, or the file that holds it.")
    ],
    device: Annotated[str, typer.Option("--devices", help="The device to check it on.")] = "host",
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face checkpoint folder (default: where it failed).")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe: a preset, maybe with overrides (default: as it failed).")
    ] = None,
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check again what failed: the same property, with what it failed on, on one device.

    A program alone, which names no check, is held against the reference. Exit code 1 when it fails."""
    from harness import replaying
    from harness.run import DeviceRun
    from harness.run_options import RunOptions
    from harness.store import DEFAULT_STORE

    case, named = replaying.read_case(_text_of(failure))
    replaying.check_of(case)
    options = RunOptions(
        devices=device,
        model=_checkpoint(model, case),
        recipes=recipe or case.recipe or "hybrid",
        store=str(DEFAULT_STORE),
        farm=farm_file,
        farm_address=farm_address,
    )
    with progress() as report:
        run = DeviceRun(options, report, lambda tally: None, on_wait=note)
        try:
            name, recipe_name = _one(device, run)
            found = _replayed(run, name, recipe_name, case, report)
        finally:
            run.close()
    data, text = _data(name, recipe_name, case, found), _text(name, recipe_name, found)
    if not named:
        data["note"] = "it names no check: only the reference was asked, and another property may have failed"
        text += f"\n{data['note']}"
    show(as_json, data, text)
    if found.failure:
        raise typer.Exit(1)


def _text_of(failure: str) -> str:
    """Raises HarnessError for a file that is no text, OSError for none."""
    if failure.lstrip().startswith("{"):
        return failure
    try:
        return Path(failure).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HarnessError(f"{failure}: sought the JSON of a failure, found no text") from error


def _checkpoint(given: Path | None, case: Case) -> Path:
    folder = given or (Path(case.model) if case.model else None)
    if folder is None:
        raise HarnessError("sought the checkpoint that this is of; give it with --model DIR")
    if not (folder / "config.json").is_file():
        raise HarnessError(f"sought a checkpoint (config.json) in {folder}, found none; give --model DIR")
    return folder.resolve()


def _one(device: str, run: DeviceRun) -> tuple[str, str]:
    """The one device and the one recipe of ``run``."""
    if len(run.devices) != 1:
        raise InventoryError(f"one device is sought; {device!r} is {', '.join(run.devices)}")
    if len(run.recipes) != 1:
        raise HarnessError(f"one recipe is sought; found {', '.join(run.recipes)}")
    return run.devices[0], next(iter(run.recipes))


def _replayed(run: DeviceRun, device: str, recipe: str, case: Case, report: Report) -> Replayed:
    from harness.replaying import replay

    with run.working(device):
        cell = run.cell(device, recipe)
        report(f"checking on {device}", 0, 1)
        return replay(cell, case)


def _text(device: str, recipe: str, found: Replayed) -> str:
    where = f"on {device} with {recipe}"
    if found.failure:
        return f"failed: {found.title}: not so {where}\n{found.failure}"
    return f"passed: {found.title} ({where}; {len(found.runs)} programs{_closeness(found)})"


def _closeness(found: Replayed) -> str:
    if found.error is None:
        return ""
    allowed = "" if found.limit is None else f" of {found.limit:g} allowed"
    return f", largest difference {found.error:.3g}{allowed}"


def _data(device: str, recipe: str, case: Case, found: Replayed) -> dict[str, Any]:
    return {
        "device": device,
        "recipe": recipe,
        "check": case.check,
        "title": found.title,
        "passed": not found.failure,
        "message": found.failure,
        "error": found.error,
        "divergence": found.divergence,
        "programs": [_program(*each) for each in found.runs],
    }


def _program(program: Program, observations: Sequence[Observation]) -> dict[str, Any]:
    return {"program": program, "operations": [_operation(seen) for seen in observations]}


def _operation(observation: Observation) -> dict[str, Any]:
    return {
        "position": observation.position,
        "positions": observation.positions,
        "rows": len(observation.logits),
        "tokens": observation.tokens,
        "refusal": observation.error,
    }
