"""A lab for real: `kvfarm head` and `kvfarm join` with Ray, a phone that comes and goes, and nothing left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from device_agents import scratch
from device_agents.deadline import Deadline
from harness.hosting import token
from tests.device_agents.fake_adb import SERIAL, FakeAdb

SECONDS = 60.0
KVFARM = (sys.executable, "-c", "from harness.cli import main; main()")


class Lab:
    """The commands as people give them, each a process. address: of the head."""

    def __init__(self, folder: Path, adb: FakeAdb) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{_free_port()}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")},
            "XDG_CONFIG_HOME": str(folder / "config"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "ANDROID_ADB_SERVER_PORT": str(adb.port),
            "KVFARM_ADDRESS": self.address,
        }

    @contextmanager
    def serving(self, when_ready: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Until it has said that it is ready; ended by SIGTERM."""
        log = self.folder / f"{arguments[0]}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*KVFARM, *arguments],
                cwd=self.folder,
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
        try:
            until(lambda: when_ready in log.read_text() or process.poll() is not None, log.read_text)
            assert process.poll() is None, log.read_text()
            yield process
            process.terminate()
            assert process.wait(SECONDS) == 0, log.read_text()
        finally:
            process.kill()
            process.wait(SECONDS)

    def kvfarm(self, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*KVFARM, *arguments],
            cwd=self.folder,
            env=self.environment | changed,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def host(self) -> dict[str, Any]:
        (row,) = json.loads(self.kvfarm("hosts", "--json").stdout)["hosts"]
        return dict(row)


def until(true: Callable[[], bool], told: Callable[[], object]) -> None:
    deadline, pause = Deadline(SECONDS), threading.Event()
    while not true():
        assert not deadline.expired, told()
        pause.wait(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def adb(tmp_path: Path) -> Iterator[FakeAdb]:
    with FakeAdb(tmp_path) as server:
        server.state = "absent"
        yield server


def test_a_lab_of_one_host_from_its_first_token_to_its_end(tmp_path: Path, adb: FakeAdb) -> None:
    lab = Lab(tmp_path, adb)
    with ExitStack() as stack:
        head = stack.enter_context(lab.serving("head of a lab", "head", "--listen", lab.address))
        secret = (tmp_path / "config" / "kvfarm" / "token").read_text()

        refused = lab.kvfarm("join", lab.address, "--name", "eve", **{token.TOKEN: "wrong"})
        assert refused.returncode == 2
        assert "it refuses our token (that of RAY_AUTH_TOKEN); copy the head's file" in refused.stderr
        refused = lab.kvfarm("hosts", **{token.MODE: "disabled"})
        assert (refused.returncode, "says that we have none" in refused.stderr) == (2, True)

        host = stack.enter_context(lab.serving("has joined", "join", lab.address, "--name", "rack1"))
        until(lambda: lab.host()["state"] == "ready", lab.host)
        assert list(lab.host()["devices"]) == ["rack1"]

        adb.state = "device"  # somebody plugs a phone in
        until(lambda: SERIAL in lab.host()["devices"], lab.host)
        watched = lab.kvfarm("devices", "--watch", "--farm-address", lab.address, "--devices=rack1")
        assert "rack1" in watched.stdout, watched.stderr
        adb.state = "absent"
        until(lambda: SERIAL not in lab.host()["devices"], lab.host)

        processes = [each for top in (head, host) for each in _family(top.pid)]
        open_to_all = [
            f"{each.name()} listens on {where.laddr}"
            for each in processes
            for where in _connections(each)
            if where.status == psutil.CONN_LISTEN
            and where.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
        ]
        assert open_to_all == []
        names = " ".join(" ".join(_words(each)) for each in processes)
        assert all(part in names for part in ("gcs_server", "raylet", "Agent")), "all of Ray was looked at"
        assert secret not in names
        folders = [Path(word) for each in processes for word in _words(each) if "kvfarm-ray-" in word]
        assert _leaks(secret, [tmp_path / "head.log", tmp_path / "join.log", *_logs(folders)]) == []

        drained = lab.kvfarm("drain", "rack1", "--because", "new hub", "--wait", "5s")
        assert drained.returncode == 0, drained.stderr
        assert "drained by" in lab.kvfarm("devices", "--farm-address", lab.address).stdout
        left = lab.kvfarm("leave")
        assert left.returncode == 0, left.stderr
        assert host.wait(SECONDS) == 0
        assert json.loads(lab.kvfarm("hosts", "--json").stdout) == {"hosts": []}
    until(lambda: not any(map(_lives, processes)), lambda: [each for each in processes if _lives(each)])


def _family(pid: int) -> list[psutil.Process]:
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


def _lives(process: psutil.Process) -> bool:
    # Ray's own two agents outlive what ended their raylet by up to a minute.
    return process.is_running() and not process.name().startswith("ray::")


def _connections(process: psutil.Process) -> list[Any]:
    try:
        return list(process.net_connections("inet"))
    except psutil.NoSuchProcess:
        return []


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _logs(words: list[Path]) -> list[Path]:
    """Of the Ray sessions that these paths, found on command lines, lie in."""
    paths = {Path(str(word).partition("=")[2] or word) for word in words}
    tops = {top for each in paths for top in each.parents if top.name.startswith(scratch.RAY)}
    return [path for top in tops for path in top.rglob("*") if path.is_file()]


def _leaks(secret: str, files: list[Path]) -> list[Path]:
    assert len(files) > 10, "Ray's logs were found"
    return [path for path in files if secret.encode() in path.read_bytes()]
