"""``kvfarm bundle``: the Python, onnxruntime and runner that a phone is sent."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.devices import CACHE
from harness.cli.output import JsonOption, progress, show
from harness.errors import HarnessError

MIB = 1 << 20


def register(app: typer.Typer) -> None:
    app.command()(bundle)


def bundle(
    abi: Annotated[
        str | None,
        typer.Option(help="arm64-v8a or x86_64.  [default with --runtime: what its binaries are for]"),
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(help="A folder with Python, onnxruntime and a run.sh of your own, in place of ours."),
    ] = None,
    relock: Annotated[
        bool,
        typer.Option(
            "--relock", help="First pin the newest Debian packages, and the wheels that this host runs."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the self-contained folder that runs the engine on a phone.

    From pinned Debian packages and wheels; kept in .kvfarm/bundles."""
    from device_agents.bundle import Bundle, build
    from device_agents.bundle.lock import LOCK_PATH, parse_abi
    from device_agents.bundle.relock import relock as write_lock

    if abi is None and runtime is None and not relock:
        raise HarnessError("name the ABI: --abi arm64-v8a for phones, --abi x86_64 for virtual ones")
    wanted = None if abi is None else parse_abi(abi)
    if relock:
        write_lock()
        if wanted is None and runtime is None:
            show(as_json, {"lock": str(LOCK_PATH)}, f"{LOCK_PATH}: written")
            return
    began = time.monotonic()
    with progress() as report:
        if runtime is not None:
            made = Bundle.from_runtime(runtime, CACHE / "bundles", wanted)
        else:
            assert wanted is not None
            made = build(wanted, CACHE / "bundles", report)
    seconds = time.monotonic() - began
    data = {
        "bundle": str(made.folder),
        "id": made.id,
        "abi": made.abi,
        "runtime": made.manifest.runtime,
        "files": len(made.files),
        "bytes": made.manifest.size,
        "versions": made.manifest.versions,
        "seconds": seconds,
    }
    size = f"{len(made.files)} files, {made.manifest.size / MIB:,.1f} MiB"
    show(as_json, data, f"{made.folder}: bundle {made.id[:16]} for {made.abi}, {size}, {seconds:.1f} s")
