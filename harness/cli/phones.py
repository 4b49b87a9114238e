"""``kvfarm phones``: virtual phones in the foreground, and what they can play."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Annotated, Any

import typer
from rich.table import Table

from harness.cli.devices import CACHE
from harness.cli.output import JsonOption, note, show

_START_S = 300.0  # the first phone of a machine has its parts to fetch
_LOOK_S = 2.0
_ASK_S = 30.0

_commands = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Virtual phones: real adbd in namespaces, on 127.0.0.1."
)


def register(app: typer.Typer) -> None:
    app.add_typer(_commands, name="phones")


@_commands.command()
def up(
    count: Annotated[int, typer.Option(help="How many.", min=1, max=64)] = 1,
    abi: Annotated[str, typer.Option(help="x86_64, or arm64-v8a (run under qemu).")] = "x86_64",
    profile: Annotated[
        str, typer.Option(help="The model they play; see `kvfarm phones profiles`.")
    ] = "pixel-8",
    as_json: JsonOption = False,
) -> None:
    """Run virtual phones until Ctrl-C; prints their addresses.

    Nothing is installed. They end with this command, however it ends."""
    from device_agents.deadline import Deadline
    from device_agents.virtual import VirtualPhone, load_profile
    from device_agents.virtual.profile import parse_abi
    from device_agents.virtual.rootfs import prepared

    played, kind, cache = load_profile(profile), parse_abi(abi), CACHE
    if prepared(kind, cache) is None:
        note("taking the parts of a virtual phone from this machine's Debian archive, once")
    root = cache / "virtual" / "phones"
    phones = [
        VirtualPhone(f"virtual-{os.getpid()}-{n}", played, kind, root, cache, shared=True)
        for n in range(1, count + 1)
    ]
    # Ctrl-C is how this ends, also where a shell started it in the background and has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        for phone in phones:
            stack.callback(phone.stop)
            phone.start(Deadline(_START_S))
        show(as_json, {"phones": [_row(phone) for phone in phones]}, _table(phones))
        note("virtual phones; `adb connect ADDRESS` reaches one, Ctrl-C ends them all")
        pause = threading.Event()
        # Ctrl-C is how this command is meant to end.
        with contextlib.suppress(KeyboardInterrupt):
            while not pause.wait(_LOOK_S):
                for phone in phones:
                    phone.relay.state()  # raises once the phone is gone


@_commands.command()
def possible(as_json: JsonOption = False) -> None:
    """Say whether this machine can run virtual phones, and what is in the way; exit code 1 if it cannot."""
    from device_agents.deadline import Deadline
    from device_agents.virtual.possible import why_not
    from device_agents.virtual.rootfs import native_abi

    wrong = why_not(native_abi(), CACHE, Deadline(_ASK_S))
    text = wrong or "yes"
    show(as_json, {"possible": not wrong, "why": text}, f"virtual phones: {text}")
    if wrong:
        raise typer.Exit(1)


@_commands.command()
def profiles(as_json: JsonOption = False) -> None:
    """List the models that a virtual phone can play, their quirks and where those were seen."""
    from device_agents.virtual import load_profile, profile_names

    known = [load_profile(name) for name in profile_names()]
    table = Table("virtual profile", "plays", "Android", "SoC", "cores", "memory", "quirks")
    for each in known:
        soc = f"{each.soc_manufacturer} {each.soc_model}"
        quirks = "\n".join(
            f"- {quirk.what}{'' if quirk.seen else ' (ours: not seen anywhere)'}" for quirk in each.quirks
        )
        model = f"{each.manufacturer} {each.model} (virtual)"
        memory = f"{each.ram_mib / 1024:.1f} GiB"
        table.add_row(each.name, model, each.android, soc, str(each.cores), memory, quirks)
    show(as_json, {"profiles": known, "virtual": True}, table)


def _row(phone: Any) -> dict[str, Any]:
    return {
        "name": phone.name,
        "address": phone.address,
        "abi": phone.abi,
        "profile": phone.profile.name,
        "model": phone.profile.model,
        "virtual": True,
    }


def _table(phones: list[Any]) -> Table:
    table = Table("virtual phone", "address", "profile", "plays", "ABI")
    for phone in phones:
        model = f"{phone.profile.manufacturer} {phone.profile.model} (virtual)"
        table.add_row(phone.name, phone.address, phone.profile.name, model, phone.abi)
    return table
