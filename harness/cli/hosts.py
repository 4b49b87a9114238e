"""``kvfarm head``, ``join``, ``hosts``, ``drain``, ``undrain``, ``leave``: a lab of many machines."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError
from harness.cli.options import UserOption
from harness.cli.output import JsonOption, note, progress, show, told
from harness.errors import HarnessError
from harness.leasing import duration, user_name

if TYPE_CHECKING:
    from harness.hosting.head import Head
    from harness.hosting.records import Host, HostRecord

DEFAULT_LISTEN = "127.0.0.1:6379"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")  # also what a label of Ray may be
_LOOK_S = 0.5
_ANSWER_S = 15.0  # a host looks for orders every second
_END_S = 120.0

HeadArgument = Annotated[str, typer.Argument(metavar="ADDRESS", help="HOST:PORT of the lab's head.")]
HeadOption = Annotated[
    str | None,
    typer.Option("--farm-address", envvar="KVFARM_ADDRESS", help="HOST:PORT of the lab's head."),
]
NameArgument = Annotated[str, typer.Argument(metavar="HOST", help="A lab host's name, see `kvfarm hosts`.")]
PortsOption = Annotated[
    str, typer.Option(metavar="FIRST-LAST", help="Ports for all of Ray's servers.  [default: any free ones]")
]
EveryInterfaceOption = Annotated[
    bool, typer.Option("--every-interface", help="Let Ray listen on all networks of this machine.")
]
WaitOption = Annotated[str, typer.Option(metavar="TIME", help="How long to wait for present leases to end.")]


def register(app: typer.Typer) -> None:
    for command in (head, join, hosts, drain, undrain, leave):
        app.command()(command)


def head(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="This machine's address in the lab's network.")
    ] = DEFAULT_LISTEN,
    token_file: Annotated[
        Path | None,
        typer.Option(help="The lab's token; made if it is not there.  [default: ~/.config/kvfarm/token]"),
    ] = None,
    ports: PortsOption = "",
    every_interface: EveryInterfaceOption = False,
) -> None:
    """Be the head of a lab, until Ctrl-C.

    Hosts join it with `kvfarm join`; see docs/farm.md. Whoever has the token can run code on every host."""
    from harness.hosting import token
    from harness.hosting.head import VERSIONS, connect, versions
    from harness.hosting.node import Ports, start_head
    from harness.reaching import Address

    where = Address.parse(listen, "could not be a head")
    path = token_file or token.default_path()
    if os.environ.get(token.MODE, "token").lower() != "token":
        note(f"{token.MODE} is set: whoever reaches this address can run code on every host of the lab")
    elif not os.environ.get(token.TOKEN):
        made = token.create(path)
        note(
            f"the lab's token is {'new' if made else 'that'} in {path}; every host needs that file, mode 0600"
        )
    token.show(path)
    with _stopped() as stopped:
        node = start_head(where, Ports.parse(ports) if ports else None, every_interface)
        try:
            connect(node.head, "could not reach our own head").put(VERSIONS, versions())
            note(f"head of a lab at {node.head}; elsewhere `kvfarm join {node.head}`. Ctrl-C ends it")
            while not stopped.wait(_LOOK_S):
                if dead := node.dead():
                    raise InfrastructureError(
                        f"of the head's Ray node {', '.join(dead)} has ended; start it again"
                    )
        finally:
            node.stop()
    note("the head has ended")


def join(
    address: HeadArgument,
    name: Annotated[str | None, typer.Option(help="This lab host's name.  [default: the machine's]")] = None,
    listen: Annotated[
        str | None, typer.Option(help="This machine's own address.  [default: the one that the head sees]")
    ] = None,
    farm_file: Annotated[
        Path | None,
        typer.Option("--farm", help="What it offers.  [default: ./farm.toml, else itself and its phones]"),
    ] = None,
    devices: Annotated[bool, typer.Option(help="Offer devices, or only use those of others.")] = True,
    token_file: Annotated[
        Path | None, typer.Option(help="The lab's token.  [default: ~/.config/kvfarm/token]")
    ] = None,
    ports: PortsOption = "",
    every_interface: EveryInterfaceOption = False,
) -> None:
    """Be a host of a lab, until Ctrl-C, SIGTERM or `kvfarm leave`.

    Joins again when the head was away. Exit code 2 when joining makes no sense before somebody does
    something."""
    from harness.hosting import token
    from harness.hosting.keeper import Options
    from harness.hosting.supervisor import keep_joined
    from harness.inventory import FILE
    from harness.reaching import Address

    head_at = Address.parse(address, f"could not join {address}")
    if token_file is not None:
        os.environ[token.PATH] = str(token_file.absolute())
    if farm_file is None and Path(FILE).is_file():
        farm_file = Path(FILE)
    options = Options(
        name=_checked(name or socket.gethostname()),
        head=address,
        listen=listen or _own_address(head_at.host, head_at.port),
        ports=ports,
        every_interface=every_interface,
        farm=str(farm_file.absolute()) if farm_file and devices else "",
        devices=devices,
    )
    with _stopped() as stopped:
        code = keep_joined(options, stopped, note)
    if code:
        raise typer.Exit(code)
    note(f"{options.name} has left {address}")


def hosts(farm_address: HeadOption = None, as_json: JsonOption = False) -> None:
    """List the lab's hosts and their devices.

    Exit code 1 when one of them is lost or late."""
    found = _all_hosts(_head(farm_address))
    table = Table("host", "address", "state", "devices", "kvfarm", "Ray", "Python", "owner", "last seen")
    for host in found:
        table.add_row(*_cells(host))
    rows = [{"state": host.state, "alive": host.alive, **vars(host.record)} for host in found]
    for row in rows:
        row["devices"] = {name: {**vars(each), "state": each.state} for name, each in row["devices"].items()}
    show(as_json, {"hosts": rows}, table)
    if any(host.state in ("lost", "late") for host in found):
        raise typer.Exit(1)


def drain(
    name: NameArgument,
    why: Annotated[
        str, typer.Option("--because", help="Told to all who wait for its devices.")
    ] = "maintenance",
    wait: WaitOption = "30m",
    user: UserOption = None,
    farm_address: HeadOption = None,
) -> None:
    """Let a host lend nothing any more, and wait for present leases to end.

    Exit code 1 when some are left at the end; it stays drained, until `kvfarm undrain`."""
    head = _head(farm_address)
    deadline = Deadline(duration(wait))
    _order(head, name, drain=True, by=user or user_name(), why=why)
    note(f"{name} lends nothing any more; waits up to {wait} for present leases")
    if left := _until_idle(head, name, deadline):
        note(f"still leased: {', '.join(left)}")
        raise typer.Exit(1)
    note(f"nothing of {name} is leased; `kvfarm leave` there, or `kvfarm undrain {name}`")


def undrain(name: NameArgument, user: UserOption = None, farm_address: HeadOption = None) -> None:
    """Let a host lend its devices again."""
    _order(_head(farm_address), name, drain=False, by=user or user_name(), why="")
    note(f"{name} lends its devices again")


def leave(
    name: Annotated[
        str | None, typer.Argument(metavar="HOST", help="Its name.  [default: the only one]")
    ] = None,
    wait: WaitOption = "0s",
) -> None:
    """End the lab host that this machine is.

    It lends nothing any more, waits for present leases, then its agent and its Ray node end."""
    from device_agents.leases import protocol
    from device_agents.leases.ledger import Ledger
    from harness.hosting import supervisor
    from harness.lab import leases_folder

    known = supervisor.joined()
    if name is None:
        if len(known) != 1:
            raise HarnessError(f"this machine has joined as {', '.join(known) or 'nothing'}; name one")
        (name,) = known
    deadline, ledger, pause = Deadline(duration(wait)), Ledger(leases_folder()), threading.Event()
    before = ledger.state()[0].drained
    ledger.act(protocol.drain("kvfarm leave", "it leaves the lab"))
    try:
        while any(not held.ended for held in ledger.act().held.values()) and not deadline.expired:
            pause.wait(min(_LOOK_S, deadline.remaining))
        supervisor.end(name, Deadline(_END_S))
    finally:
        if not before:
            ledger.act(protocol.drain("kvfarm leave", ""))  # the next `kvfarm join` lends again
    note(f"{name} has left")


# -- inside -----------------------------------------------------------------------------------


def _head(address: str | None) -> Head:
    from harness.hosting.head import connect

    wanted = address or DEFAULT_LISTEN
    return connect(wanted, f"could not ask the lab's head at {wanted} (--farm-address, KVFARM_ADDRESS)")


def _all_hosts(head: Head) -> tuple[Host, ...]:
    from harness.hosting import records

    return records.hosts(head)


def _order(head: Head, name: str, *, drain: bool, by: str, why: str) -> None:
    """Tell the host, and wait until it has heard. Raises InfrastructureError: it does not hear."""
    from harness.hosting.records import ORDERS, Order

    known = {host.record.name: host for host in _all_hosts(head)}
    if name not in known:
        raise InfrastructureError(f"sought lab host {name!r}, found {', '.join(known) or 'none'}")
    head.put(ORDERS + name, Order(drain, by, why))
    deadline, pause = Deadline(_ANSWER_S), threading.Event()
    while bool(_record(head, name).drained) is not drain:
        if deadline.expired:
            raise DeadlineExceeded(
                f"{name} is {known[name].state} and did not follow within {_ANSWER_S:g} s; it "
                "will when it is back"
            )
        pause.wait(_LOOK_S)


def _until_idle(head: Head, name: str, deadline: Deadline) -> list[str]:
    """Devices that are leased when the deadline is over, with who has them; none as soon as none is."""
    pause = threading.Event()
    with progress() as report:
        while True:
            devices = _record(head, name).devices
            left = [f"{each} to {device.holder}" for each, device in devices.items() if device.holder]
            if not left or deadline.expired:
                return left
            spent = deadline.seconds - deadline.remaining
            report(f"{len(left)} leased", int(spent), int(deadline.seconds))
            pause.wait(min(_LOOK_S, deadline.remaining))


def _record(head: Head, name: str) -> HostRecord:
    for host in _all_hosts(head):
        if host.record.name == name:
            return host.record
    raise InfrastructureError(f"lab host {name} has left")


def _cells(host: Host) -> list[str]:
    record, versions = host.record, host.record.versions
    style = {"ready": "green", "drained": "yellow"}.get(host.state, "red")
    state = f"[{style}]{host.state}[/]" + (f" {told(record.drained)}" if record.drained else "")
    if record.adb:
        state += f"\nadb: {told(record.adb)}"
    devices = "\n".join(told(f"{name}: {each.state}") for name, each in record.devices.items())
    return [
        told(record.name),
        told(record.address),
        state,
        devices or "none",
        *(told(versions.get(name, "")) for name in ("kvfarm", "ray", "python")),
        told(record.owner),
        f"{max(0.0, time.time() - record.seen):.0f} s ago",
    ]


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise HarnessError(
            f"sought a name of letters, digits, '.', '_' and '-', 63 at most, for this host, found "
            f"{name!r}; give --name"
        )
    return name


def _own_address(host: str, port: int) -> str:
    """The address that this machine has for the head. Nothing is sent for it."""
    try:
        family, kind, number, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.connect(where)
            address: str = probe.getsockname()[0]
            return address
    except OSError as error:
        raise InfrastructureError(
            f"no way to {host} from here ({error}); correct it, or give --listen"
        ) from error


@contextmanager
def _stopped() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set while the body runs."""
    event = threading.Event()
    before = {each: signal.signal(each, lambda *_: event.set()) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
