"""``kvfarm devices``: who is in the farm."""

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

if TYPE_CHECKING:
    from harness.store.protocol import Flakes

CACHE = Path(".kvfarm")


def register(app: typer.Typer) -> None:
    app.command()(devices)


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

    meant = choosing.read(selection, choosing.inventory_for(farm_file, farm_address))
    if watch:
        from harness.cli.watching import watch as watch_devices

        with Farm(meant.inventory, meant.names, farm_address) as farm:
            watch_devices(farm, meant.inventory, meant.names, farm_address)
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


def _flakes(store: str | None) -> dict[str, Flakes]:
    """None where there is no store yet."""
    if not stored(store):
        return {}
    from harness.store import open_store

    with open_store(store) as results:
        return results.flakes()


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
        "drained": status.drained or None,
        "owner": known.owner(status.name) or None,
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
