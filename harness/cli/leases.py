"""``kvfarm lease``, ``quarantine``, ``lift``: a device for a person, or for nobody; and who has which."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from device_agents.deadline import Deadline
from device_agents.lab_types import DeviceStatus, Lease
from harness import inventory
from harness.cli.options import AddressOption, FarmOption, PriorityOption, UserOption, WaitOption
from harness.cli.output import JsonOption, note, show
from harness.leasing import Terms, duration, holder, user_name

if TYPE_CHECKING:
    from harness.farm import Farm

_LOOK_S = 1.0


def register(app: typer.Typer) -> None:
    app.command()(lease)
    app.command()(quarantine)
    app.command()(lift)


def lease(
    selection: Annotated[
        str, typer.Argument(metavar="DEVICES", help="A device, names and pools, or a condition.")
    ],
    limit: Annotated[str, typer.Option("--for", metavar="TIME", help="For how long at most.")] = "20m",
    count: Annotated[
        int | None,
        typer.Option(help="So many of the devices, all at once.  [default: all; 1 of a condition]"),
    ] = None,
    user: UserOption = None,
    priority: PriorityOption = 0,
    wait: WaitOption = "10m",
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep devices for yourself, until Ctrl-C or the time is over.

    Exit code 1 when a device was lost before."""
    from harness import choosing
    from harness.farm import Farm

    meant = choosing.read(selection, choosing.inventory_for(farm_file, farm_address))
    terms = Terms(user or user_name(), priority, duration(wait), limit_s=duration(limit))
    with (
        Farm(meant.inventory, meant.names, farm_address, terms=terms, on_wait=_Once().say) as farm,
        _terminated_like_interrupted(),  # after Ray has set a handler of its own
    ):
        names = meant.names if meant.condition is None else meant.choose(farm.status()).names
        held = farm.hold(count or (len(names) if meant.condition is None else 1), names)
        lost: tuple[str, ...] = ()
        with suppress(KeyboardInterrupt):
            show(as_json, {"leases": held}, _how_to_use(held, meant.inventory))
            sys.stdout.flush()  # whoever reads it through a pipe must not wait for our end
            lost = _keep(farm, held, Deadline(terms.limit_s))
    if lost:
        note(f"lost: {', '.join(lost)}")
        raise typer.Exit(1)
    note(f"given back: {', '.join(each.device for each in held)}")


def quarantine(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="The device that nobody is to get.")],
    evidence: Annotated[str, typer.Option("--because", help="What is wrong with it.")],
    limit: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="For how long.  [default: until lifted]")
    ] = None,
    user: UserOption = None,
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
) -> None:
    """Lend a device to nobody; whoever has it loses it."""
    with _farm(device, farm_file, farm_address) as farm:
        seconds = None if limit is None else duration(limit)
        farm.quarantine(device, evidence, holder(os.getpid(), user), seconds)
    note(
        f"{device} is quarantined {f'for {limit}' if limit else f'until `kvfarm lift {device}`'}: {evidence}"
    )


def lift(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="A device in quarantine.")],
    golden_job: Annotated[
        bool,
        typer.Option("--by-golden-job", help="Only if a tiny program gives there the answer that is known."),
    ] = False,
    user: UserOption = None,
    wait: WaitOption = "1m",
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
) -> None:
    """End a device's quarantine."""
    by, terms = holder(os.getpid(), user), Terms(user or user_name())
    if golden_job:
        terms = dataclasses.replace(terms, wait_s=duration(wait), repair=True)
    with _farm(device, farm_file, farm_address, terms) as farm:
        if golden_job:
            from harness import golden
            from harness.cli.devices import CACHE
            from harness.health import prove

            note(f"{device}: golden job")
            prove(farm, device, golden.artifact(CACHE))
            by += ", for it did the golden job"
        farm.lift(device, by)
    note(f"{device} may be leased again")


def state(status: DeviceStatus) -> str:
    """One cell about the lease of a device that answers."""
    if status.quarantined:
        return f"quarantined {status.quarantined}"
    if status.drained and status.lease is None:
        return f"drained {status.drained}"
    held = status.lease
    waiting = f", {status.waiting} waiting" if status.waiting else ""
    return f"leased to {held.holder} until {clock(held.until)}{waiting}" if held else f"free{waiting}"


# -- inside -----------------------------------------------------------------------------------


class _Once:
    """Says a line to the person who waits whenever it is another."""

    def __init__(self) -> None:
        self._said = ""

    def say(self, reason: str) -> None:
        # The seconds in it change all the time.
        shape = "".join(letter for letter in reason if not letter.isdigit())
        if shape != self._said:
            note(reason)
            self._said = shape


def _how_to_use(held: tuple[Lease, ...], known: inventory.Inventory) -> str:
    lines = []
    for each in held:
        entry = known.device(each.device)
        serial = entry.options.get("serial")
        how = f"adb -s {serial} shell" if serial else "this machine" if entry.kind == "host" else entry.kind
        where = "" if entry.lab == inventory.LOCAL_LAB else f" at lab host {entry.lab}"
        lines.append(f"{each.device} is yours until {clock(each.until)} (token {each.token}): {how}{where}")
    return "\n".join([*lines, "Ctrl-C gives it back." if len(held) == 1 else "Ctrl-C gives them back."])


def _keep(farm: Farm, held: tuple[Lease, ...], deadline: Deadline) -> tuple[str, ...]:
    """Until the time is over; returns the devices that were lost before."""
    pause = threading.Event()
    while not deadline.expired:
        pause.wait(min(_LOOK_S, deadline.remaining))
        lost = tuple(each.device for each in held if not farm.has(each))
        if lost and not deadline.expired:
            return lost
    return ()


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, and whoever started us may have had that ignored."""
    before = {
        each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _farm(
    device: str, farm_file: Path | None, farm_address: str | None, terms: Terms | None = None
) -> Iterator[Farm]:
    from harness import choosing
    from harness.farm import Farm

    whole = choosing.inventory_for(farm_file, farm_address)
    with Farm(whole, inventory.select(device, whole), farm_address, terms=terms) as farm:
        yield farm


def clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
