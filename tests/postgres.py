"""A PostgreSQL server for one session of tests, gone with it however it ends.

    python -m tests.postgres FOLDER    runs one there until its stdin ends, then removes the folder

The server is this process's child and not the tests': when they are killed, the pipe between us breaks.
It listens on a socket in FOLDER alone, and root starts it as somebody else, since PostgreSQL refuses root.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from device_agents.deadline import Deadline

START_S = 60.0
STOP_S = 20.0
USER = "kvfarm"
# Nothing here outlives the tests, so nothing waits for the disk.
SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=16MB")


def programs() -> Path | None:
    """The folder of initdb and postgres: on PATH, or where Debian has it, the newest version."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in versions), key=lambda p: int(p.parent.name), default=None)


@contextmanager
def server(binaries: Path) -> Iterator[str]:
    """The folder of a running server; see ``url``.

    Raises:
        AssertionError: it did not start; with what it said.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvfarm-pg-"))
    command = [sys.executable, "-m", __name__, str(folder), str(binaries)]
    keeper = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[1],
        start_new_session=True,  # Ctrl-C is for the tests; the server goes when they have gone
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        said = keeper.stdout.readline()
        assert said == "ready\n", said + keeper.stdout.read()
        yield str(folder)
    finally:
        keeper.stdin.close()
        keeper.wait(STOP_S + 10)
        keeper.stdout.close()


def url(folder: str, database: str, password: str = "") -> str:
    """The SQLAlchemy URL of a database of the server in ``folder``."""
    secret = f":{password}" if password else ""
    return f"postgresql+psycopg://{USER}{secret}@/{database}?host={quote(folder, safe='')}"


def keep(folder: Path, binaries: Path) -> None:
    """Run a server in ``folder`` until stdin ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the end of stdin is the one way to end
    try:
        with _running(folder, binaries):
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            sys.stdin.read()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(folder: Path, binaries: Path) -> Iterator[None]:
    owner = _owner()
    os.chown(folder, owner["user"], owner["group"])
    data = folder / "data"
    made = subprocess.run(
        [binaries / "initdb", "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
        **owner,
    )
    if made.returncode:
        raise SystemExit(f"initdb: {made.stderr}")
    options = [part for setting in SETTINGS for part in ("-c", setting)]
    command: list[str | Path] = [binaries / "postgres", "-D", data, "-k", folder, "-h", "", *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **owner)
    try:
        _await(process, folder, binaries)
        yield
    finally:
        process.send_signal(signal.SIGINT)  # "fast": connections are ended
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)


def _await(process: subprocess.Popen[Any], folder: Path, binaries: Path) -> None:
    deadline = Deadline(START_S)
    while subprocess.run([binaries / "pg_isready", "-q", "-h", folder], check=False, timeout=10).returncode:
        if process.poll() is not None or deadline.expired:
            raise SystemExit((folder / "log").read_text())
        time.sleep(0.05)


def _owner() -> dict[str, Any]:
    """Whom the server runs as: us, or for root the packages' own user, or nobody."""
    if os.geteuid() != 0:
        return {"user": os.geteuid(), "group": os.getegid()}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = known.get("postgres") or known["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid}


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
