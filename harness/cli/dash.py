"""``kvfarm dash``: the farm on a live page, and for Prometheus."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness import inventory
from harness.cli.options import AddressOption, FarmOption, StoreOption
from harness.cli.output import note
from harness.cli.runs import stored

if TYPE_CHECKING:
    from device_agents.leases.ledger import Entry
    from harness.dash.gathering import Source


def register(app: typer.Typer) -> None:
    app.command()(dash)


def dash(
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8347,
    public: Annotated[
        bool,
        typer.Option("--public", help="Let others reach it; there is no password and no encryption."),
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name that it may be asked for by; repeat.")
    ] = None,
    store: StoreOption = None,
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
) -> None:
    """Show devices, leases, work, quarantine and history on a live page, until Ctrl-C. Changes nothing.

    Of this machine; with --farm-address of every lab host whose agent runs. /metrics is for Prometheus."""
    from harness.dash.gathering import Gatherer
    from harness.dash.metrics import FarmCollector
    from harness.dash.server import Address, Dash, Remembered, listen, serve
    from harness.store import open_store

    address = Address(host, port, public, tuple(name.lower() for name in allow_host or ()))
    address.check()
    with ExitStack() as stack:
        results = stack.enter_context(open_store(store)) if stored(store) else None
        if results is None:
            note("there is no store yet: no history; `kvfarm run` makes one")
        source, entries = _here(farm_file) if farm_address is None else _joined(farm_address, stack)
        gatherer = Gatherer([source], results)
        outcomes = results.outcomes if results is not None else dict
        collector = FarmCollector(gatherer.state, outcomes, Remembered(entries))
        listener = stack.enter_context(listen(address))
        address = dataclasses.replace(address, port=listener.getsockname()[1])
        shown = f"[{host}]" if ":" in host else host
        note(f"http://{shown}:{address.port}/ until Ctrl-C" + (", for everybody" if public else ""))
        serve(Dash(gatherer, results, collector).app(address)).run(sockets=[listener])


def _here(farm_file: Path | None) -> tuple[Source, Callable[[], Sequence[Entry]]]:
    """This machine's lease journal, and what is counted in it."""
    from device_agents.leases import audit
    from device_agents.leases.ledger import Journal
    from harness.dash.gathering import LocalJournal
    from harness.lab import leases_folder

    folder = leases_folder()
    return LocalJournal(Journal(folder), inventory.load(farm_file)), lambda: audit.entries(folder)


def _joined(address: str, stack: ExitStack) -> tuple[Source, Callable[[], Sequence[Entry]]]:
    """The same of all lab hosts of a Ray cluster."""
    from harness import watching
    from harness.cluster import ensure_ray
    from harness.dash.joined import LabAgents

    stack.enter_context(ensure_ray(address))
    return LabAgents(address), watching.all_entries
