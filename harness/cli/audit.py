"""``kvfarm audit``: who leased, quarantined, lifted, restarted and waived what, when and why."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from device_agents.leases import audit as journal
from harness import auditing, inventory
from harness.auditing import Deed
from harness.cli.history import since_when
from harness.cli.options import AddressOption, FarmOption, StoreOption
from harness.cli.output import JsonOption, note, show
from harness.cli.runs import stored


def register(app: typer.Typer) -> None:
    app.command()(audit)


def audit(
    device: Annotated[str | None, typer.Option(help="A device's name; * stands for anything.")] = None,
    user: Annotated[str | None, typer.Option(help="Whose deeds; * stands for anything.")] = None,
    since: Annotated[str | None, typer.Option(help="A date, a time (UTC), or so many days: 30d.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows, the newest.")] = 100,
    store: StoreOption = None,
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Who did what in the farm, oldest first: leases, quarantines, restarts, waivers.

    Of this machine; with --farm-address of every lab host whose agent runs."""
    known = inventory.load(farm_file)
    deeds = list(_leases(known, farm_address))
    if stored(store):
        from harness.store import open_store

        with closing(open_store(store)) as results:
            deeds += auditing.waived(results.headers(kind="gate"))
    found = auditing.chosen(deeds, device, user, since_when(since))
    if len(found) > limit:
        note(f"the newest {limit} of {len(found)}; --limit shows more")
    show(as_json, {"events": found[-limit:]}, _table(found[-limit:]))


def _leases(known: inventory.Inventory, address: str | None) -> Iterator[Deed]:
    if address is None:
        from harness.lab import leases_folder

        events = journal.events(journal.entries(leases_folder()))
        yield from auditing.at_host(socket.gethostname(), events, known)
        return
    from harness import watching
    from harness.cluster import ensure_ray

    with ensure_ray(address):
        for agent in watching.agents():
            events = journal.events(agent.journal())
            yield from auditing.at_host(agent.observe().host, events, known)


def _table(deeds: list[Deed]) -> Table:
    table = Table("when (UTC)", "what", "device", "who", "why", "run", "host")
    for deed in deeds:
        when = deed.at.replace("T", " ")[:19]
        told = (when, deed.what, deed.device, deed.who, deed.why, deed.run, deed.host)
        table.add_row(*map(escape, told))
    return table
