"""``kvfarm devices --watch``: who has what, and what is plugged in, as it changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.live import Live
from rich.table import Table

from device_agents.errors import InfrastructureError
from device_agents.lab_types import DeviceStatus
from harness.cli.leases import clock
from harness.cli.output import Console, told
from harness.farm import Farm
from harness.inventory import Inventory
from harness.plugging import overlay, plugs_of

_LOOK_S = 1.0
_ENDS_S = 30.0
_FILE_COLUMNS = 200


def watch(farm: Farm, inventory: Inventory, names: tuple[str, ...], farm_address: str | None) -> None:
    """Show who has what until Ctrl-C; where there is no terminal, once."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _FILE_COLUMNS)  # a file is no narrower than its widest line
        with plugs_of(inventory, farm_address) as plugs:
            statuses = farm.status()
            console.print(table(overlay(statuses, inventory, plugs.now())))
        return
    waiting = tuple(DeviceStatus(name, inventory.device(name).kind, None, "being asked") for name in names)
    with (
        plugs_of(inventory, farm_address) as plugs,
        _asking(farm, waiting) as latest,
        Live(console=console, refresh_per_second=4, screen=False) as live,
    ):
        while True:
            with_plugs = latest[0]
            try:
                with_plugs = overlay(latest[0], inventory, plugs.now())
            except InfrastructureError as error:  # the head is away; what we knew stays
                console.print(f"kvfarm: {error}", highlight=False, markup=False)
            live.update(table(with_plugs))
            threading.Event().wait(_LOOK_S)


@contextmanager
def _asking(farm: Farm, first: tuple[DeviceStatus, ...]) -> Iterator[list[tuple[DeviceStatus, ...]]]:
    """The last statuses, asked for in a thread: a phone that was pulled out answers late."""
    latest, stopped = [first], threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            latest[0] = farm.status()
            stopped.wait(_LOOK_S)

    thread = threading.Thread(target=ask, name="devices", daemon=True)
    thread.start()
    try:
        yield latest
    finally:
        stopped.set()
        thread.join(_ENDS_S)


def table(statuses: tuple[DeviceStatus, ...]) -> Table:
    """Who has which device, since when and until when, and how many wait."""
    found = Table("device", "state", "holder", "since", "until", "heartbeat", "waiting")
    for status in statuses:
        held, waiting = status.lease, str(status.waiting or "")
        word = (
            "silent"
            if status.error
            else "drained"
            if status.drained and not held
            else "quarantined"
            if status.quarantined
            else "leased"
            if held
            else "free"
        )
        style = {"free": "green", "leased": "yellow", "drained": "yellow"}.get(word, "red")
        cells = ("", "", "", "")
        if held is not None:
            ago = f"{max(0.0, time.time() - held.beat):.0f} s ago"
            cells = (told(held.holder), clock(held.since), clock(held.until), ago)
        elif why := status.error or status.quarantined or status.drained:
            cells = (told(why), "", "", "")
        found.add_row(told(status.name), f"[{style}]{word}[/]", *cells, waiting)
    return found
