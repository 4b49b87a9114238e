"""``kvfarm connect`` and ``kvfarm pair``: phones without a cable."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from device_agents.logs import keep_secret
from harness.cli.output import JsonOption, note, show

_CONNECT_S = 30.0
_PAIR_S = 60.0


def register(app: typer.Typer) -> None:
    app.command()(connect)
    app.command()(pair)


def connect(
    address: Annotated[
        str, typer.Argument(help="Of the phone: HOST or HOST:PORT.  [default port: 5555]", metavar="ADDRESS")
    ],
    as_json: JsonOption = False,
) -> None:
    """Reach a phone over the network.

    Done only when a shell answers there, whatever adb says."""
    from device_agents.adb import wireless
    from device_agents.adb.connection import AdbServer
    from device_agents.deadline import Deadline

    serial = wireless.serial_of(address)
    note(f"connecting to {serial}, up to {_CONNECT_S:g} s")
    found = wireless.connect(AdbServer.default(), serial, Deadline(_CONNECT_S))
    text = (
        f"{found.serial}: {found.model or 'a phone'} answers; use it with --devices=adb, or in farm.toml:\n"
    )
    text += f'options = {{ serial = "{found.serial}" }}'
    show(as_json, {"serial": found.serial, "model": found.model}, text)


def pair(
    address: Annotated[
        str,
        typer.Argument(help="HOST:PORT that the phone shows in its pairing dialog.", metavar="ADDRESS"),
    ],
    as_json: JsonOption = False,
) -> None:
    """Make this computer known to a phone with Android 11 or newer.

    On the phone: Developer options, Wireless debugging, Pair device with pairing code. That code is asked
    for, or read from stdin where that is no terminal; it is no option, for every user sees those of every
    process."""
    from device_agents.adb import wireless
    from device_agents.adb.connection import AdbServer
    from device_agents.deadline import Deadline

    wireless.check_pairing_address(address)
    code = _asked() if sys.stdin.isatty() else sys.stdin.readline()
    keep_secret(code.strip())
    note(f"pairing with {address}, up to {_PAIR_S:g} s")
    name = wireless.pair(AdbServer.default(), address, code.strip(), Deadline(_PAIR_S))
    show(
        as_json,
        {"paired": name},
        f"paired with {name}; now `kvfarm connect` it at the port that Wireless debugging shows",
    )


def _asked() -> str:
    # err: stdout is for the answer alone.
    code: str = typer.prompt("Pairing code", hide_input=True, err=True)
    return code
