"""Which adb this machine has, and whether its server and its programs are of one kind.

A program that finds a server of another protocol version kills it and starts its own, and every
connection with it: AOSP packages/modules/adb client/adb_client.cpp, "adb server version (%d) doesn't
match this client (%d); killing...".
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from device_agents.adb.connection import AdbServer
from device_agents.adb.library import adbutils
from device_agents.api import Finding
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError
from device_agents.local import LocalTransport

_RUN_S = 10.0
_ASK_S = 5.0
_VARIABLE = "ADBUTILS_ADB_PATH"
_GET = f"install Android's platform-tools (Debian: adb), or set {_VARIABLE}"


@dataclass(frozen=True)
class Program:
    """protocol: its 41 in 1.0.41, which a server must share; None when it does not run. failure: why not."""

    path: str
    protocol: int | None = None
    version: str = ""
    failure: str = ""


def diagnose_adb(server: AdbServer, deadline: Deadline) -> tuple[Finding, ...]:
    """Programs, their versions, and the server; none is started."""
    found = [_asked(path, deadline) for path in _paths()]
    chosen = _chosen(found)
    return (_program(found, chosen), *_versions(found), _server(server, chosen, deadline))


def _chosen(found: list[Program]) -> Program | None:
    """The one that kvfarm uses, as adbutils.adb_path chooses: what is named, else the first that runs."""
    named = os.environ.get(_VARIABLE)
    return next((p for p in found if p.protocol is not None and named in (None, "", p.path)), None)


def _paths() -> Iterator[str]:
    """In the order in which one is sought."""
    candidates = [os.environ.get(_VARIABLE)]
    candidates += [shutil.which("adb", path=folder) for folder in os.get_exec_path()]
    candidates.append(str(Path(adbutils.__file__).parent / "binaries" / "adb"))
    seen = set()
    for number, path in enumerate(candidates):
        # What somebody has named counts also when it is not there.
        if path and (number == 0 or Path(path).is_file()) and os.path.realpath(path) not in seen:
            seen.add(os.path.realpath(path))
            yield path


def _asked(path: str, deadline: Deadline) -> Program:
    try:
        done = LocalTransport().run([path, "version"], Deadline(min(deadline.remaining, _RUN_S)))
    except InfrastructureError as error:
        return Program(path, failure=str(error))
    text = done.stdout.decode(errors="replace")
    protocol = re.search(r"^Android Debug Bridge version \d+\.\d+\.(\d+)", text, re.MULTILINE)
    version = re.search(r"^Version (\S+)", text, re.MULTILINE)
    if done.returncode or protocol is None:
        words = (done.stderr.decode(errors="replace").strip() or text.strip())[-200:]
        return Program(path, failure=f"`{path} version` gave {done.returncode}: {words}")
    return Program(path, int(protocol[1]), version[1] if version else f"1.0.{protocol[1]}")


def _program(found: list[Program], chosen: Program | None) -> Finding:
    if chosen is not None:
        return Finding("program", "ok", f"{chosen.path}, {chosen.version}")
    if not found:
        return Finding("program", "fix", f"no adb in ${_VARIABLE}, on PATH or in adbutils", _GET)
    return Finding("program", "fix", f"{found[0].path} does not run: {found[0].failure}", _GET)


def _versions(found: list[Program]) -> Iterator[Finding]:
    running = [program for program in found if program.protocol is not None]
    if len(running) < 2:
        return
    text = "; ".join(f"{program.path} {program.version}" for program in running)
    if len({program.protocol for program in running}) == 1:
        yield Finding("versions", "ok", f"{text}; one protocol")
    else:
        do = f"keep one, or name it in {_VARIABLE}: each kills the other's server"
        yield Finding("versions", "fix", text, do)


def _server(server: AdbServer, chosen: Program | None, deadline: Deadline) -> Finding:
    asking = AdbServer(server.port, start=False)
    try:
        version = asking.query("host:version", Deadline(min(deadline.remaining, _ASK_S)))
    except InfrastructureError as error:
        if "no adb server" in str(error):
            return Finding("server", "ok", f"none at port {server.port}; started when a phone is asked for")
        return Finding("server", "fix", str(error), f"stop it: adb -P {server.port} kill-server")
    protocol = int(version, 16) if re.fullmatch(r"[0-9a-fA-F]{1,8}", version) else None
    if chosen is not None and protocol != chosen.protocol:
        return Finding(
            "server",
            "fix",
            f"at port {server.port} speaks protocol {protocol}, {chosen.path} speaks {chosen.protocol}",
            "stop the server and start it again with that program: its next use would kill it anyway",
        )
    return Finding("server", "ok", f"at port {server.port}, protocol {protocol}")
