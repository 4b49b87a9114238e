"""``kvfarm devices`` and ``replay``: who is in the farm, and one program on one device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from device_agents.lab_types import DeviceStatus
from harness import inventory
from harness.choosing import Choice
from harness.cli import leases
from harness.cli.options import AddressOption, FarmOption, StoreOption
from harness.cli.output import JsonOption, note, progress, show
from harness.cli.runs import stored
from harness.errors import HarnessError, InventoryError
from harness.recipes import parse_recipe
from kvengine.program import Observation, Program

if TYPE_CHECKING:
    from harness.store.protocol import Flakes

CACHE = Path(".kvfarm")


def register(app: typer.Typer) -> None:
    app.command()(devices)
    app.command()(replay)


def devices(
    selection: Annotated[
        str,
        typer.Option(
            "--devices",
            help="host, farm (all), adb (phones that adb knows), virtual:N, names of devices and pools, "
            "or a condition: 'abi==arm64-v8a and ram>=8GiB'.",
        ),
    ] = inventory.ALL,
    why: Annotated[
        bool, typer.Option("--why", help="Say of each device whether it is chosen, and why not.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on and show who has what, until Ctrl-C.")
    ] = False,
    store: StoreOption = None,
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the farm's devices, who they are and who has them.

    Exit code 1 when one of them does not answer, or none is chosen."""
    from harness import choosing
    from harness.farm import Farm

    meant = choosing.read(selection, inventory.load(farm_file))
    if watch:
        with Farm(meant.inventory, meant.names, farm_address) as farm:
            leases.watch(farm)
        return
    with progress() as report, Farm(meant.inventory, meant.names, farm_address) as farm:
        report(f"asking {len(meant.names)} devices who they are", 0, 1)
        statuses = farm.status()
    choice = meant.judge(statuses)
    if why:
        show(as_json, _reasons(choice), _why_table(choice))
        raise typer.Exit(0 if choice.names else 1)
    if meant.condition is not None:
        statuses = tuple(s for s in statuses if s.name in meant.choose(statuses).names)
    flakes = _flakes(store)
    columns = ("device", "kind", "model", "SoC", "ABI", "API", "cores", "memory", "ORT", "stopped", "state")
    table = Table(*columns)
    for status in statuses:
        flaky = flakes.get(status.name)
        stopped = f"{flaky.stopped} of {flaky.results}" if flaky else ""  # by infrastructure
        cells = (status.name, status.kind, *_identity_cells(status), stopped, _state(status))
        table.add_row(*map(escape, cells))
    data = {"devices": [_row(s, meant.inventory) | {"flakes": flakes.get(s.name)} for s in statuses]}
    show(as_json, data | {"not_chosen": _reasons(choice)["not_chosen"]}, table)
    for each in meant.passed_over if meant.condition is None else ():
        note(f"{each.name}: {each.reason}")
    if any(status.identity is None for status in statuses):
        raise typer.Exit(1)


def replay(
    program: Annotated[str, typer.Argument(help="A program's JSON, or the file that holds it.")],
    model: Annotated[Path, typer.Option(help="Hugging Face checkpoint folder.")],
    device: Annotated[str, typer.Option("--devices", help="The device to run it on.")] = "host",
    recipe: Annotated[str, typer.Option(help="Recipe: a preset, maybe with overrides.")] = "hybrid",
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one program on one device and compare with the reference.

    Exit code 1 when they differ."""
    from harness import choosing
    from harness.artifacts import artifact_of, resolved
    from harness.compare import CheckFailed, agree_with_reference
    from harness.farm import Farm
    from harness.reference import start_reference
    from harness.reference.rounded import is_exact, rounded_checkpoint
    from harness.tolerances import tolerance_for

    meant = choosing.read(device, inventory.load(farm_file))
    known, names = meant.inventory, meant.names
    if meant.condition is not None:
        raise InventoryError(f"a program is replayed on one device; name it instead of {device!r}")
    if len(names) != 1:
        raise InventoryError(f"a program is replayed on one device; {device!r} is {', '.join(names)}")
    parsed, chosen = _program(program), resolved(parse_recipe(recipe), model)
    tolerance = tolerance_for(chosen.export, rounded_reference=chosen.foreign is None)
    with progress() as report, Farm(known, names, farm_address) as farm:
        artifact = artifact_of(model, chosen, CACHE / "artifacts", report)
        with farm.open(names[0], artifact, chosen.session, report) as session:
            observations = session.run_program(parsed)
        # Against the weights that the recipe keeps, as the suite does.
        exact = chosen.foreign is not None or is_exact(chosen.export)
        weights = model if exact else rounded_checkpoint(model, chosen.export, CACHE / "rounded")
        with start_reference(weights) as reference:
            data: dict[str, Any] = {"device": names[0], "recipe": chosen.name, "agrees": True}
            try:
                spec = artifact.manifest.spec
                plan = chosen.export.cache
                agreement = agree_with_reference(parsed, observations, reference, spec, plan, tolerance)
                data |= {"error": agreement.error, "message": f"agrees; largest error {agreement.error:.3g}"}
            except CheckFailed as failure:
                data |= {"agrees": False, "message": str(failure), "divergence": failure.divergence}
    data["operations"] = [_operation(observation) for observation in observations]
    show(as_json, data, f"{names[0]} with {chosen.name}: {data['message']}")
    if not data["agrees"]:
        raise typer.Exit(1)


def _flakes(store: str | None) -> dict[str, Flakes]:
    """None where there is no store yet."""
    if not stored(store):
        return {}
    from harness.store import open_store

    with open_store(store) as results:
        return results.flakes()


def _program(text: str) -> Program:
    """From JSON, or from a file of it. Raises HarnessError for anything else."""
    is_json = text.lstrip().startswith("{")
    try:
        return Program.from_json(text if is_json else Path(text).read_text())
    except ValueError as error:
        raise HarnessError(f"this is no program: {error}") from error


def _operation(observation: Observation) -> dict[str, Any]:
    return {
        "position": observation.position,
        "positions": observation.positions,
        "rows": len(observation.logits),
        "tokens": observation.tokens,
        "refusal": observation.error,
    }


def _row(status: DeviceStatus, known: inventory.Inventory) -> dict[str, Any]:
    return {
        "name": status.name,
        "kind": status.kind,
        "lab": known.device(status.name).lab,
        "identity": status.identity,
        "error": status.error,
        "leased_to": status.lease.holder if status.lease else None,
        "lease": status.lease,
        "waiting": status.waiting,
        "quarantined": status.quarantined or None,
    }


def _reasons(choice: Choice) -> dict[str, Any]:
    passed = [{"name": each.name, "why": each.reason} for each in choice.passed_over]
    return {"chosen": list(choice.names), "not_chosen": passed}


def _why_table(choice: Choice) -> Table:
    table = Table("device", "chosen", "why not")
    for name in choice.names:
        table.add_row(escape(name), "yes", "")
    for each in choice.passed_over:
        table.add_row(escape(each.name), "no", escape(each.reason))
    return table


def _identity_cells(status: DeviceStatus) -> list[str]:
    identity = status.identity
    if identity is None:
        return [""] * 7
    model = identity.model + (f" ({identity.simulated})" if identity.simulated else "")
    memory = f"{identity.ram_bytes / 2**30:.1f} GiB"
    version = identity.runtime.get("onnxruntime", "")
    api = "" if identity.api_level is None else str(identity.api_level)
    return [model, identity.soc, identity.abi, api, str(identity.cores), memory, version]


def _state(status: DeviceStatus) -> str:
    if status.error:
        return status.error
    return leases.state(status)
