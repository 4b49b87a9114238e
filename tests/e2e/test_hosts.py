"""A lab for real: `kvfarm head` and `kvfarm join` with Ray, a phone that comes and goes, and nothing left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from device_agents import scratch
from device_agents.deadline import Deadline
from harness import cli
from harness.hosting import token
from harness.hosting.head import Head, connect
from harness.hosting.records import Host, hosts
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


def host(head: Head) -> Host | None:
    """The one there is."""
    return next(iter(hosts(head)), None)


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


@pytest.fixture
def lab(tmp_path: Path, adb: FakeAdb, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """This process is a client of it: it has the token, and looks without starting a command each time."""
    found = Lab(tmp_path, adb)
    for name in (token.MODE, token.TOKEN):
        monkeypatch.setenv(name, "token")
        monkeypatch.delenv(name)
    monkeypatch.setenv(token.PATH, str(tmp_path / "config" / "kvfarm" / "token"))
    monkeypatch.setenv("XDG_CACHE_HOME", found.environment["XDG_CACHE_HOME"])
    yield found
    monkeypatch.undo()
    token._read_again()


def test_a_lab_of_one_host_from_its_first_token_to_its_end(
    lab: Lab, adb: FakeAdb, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        top = stack.enter_context(lab.serving("head of a lab", "head", "--listen", lab.address))
        secret = (lab.folder / "config" / "kvfarm" / "token").read_text()
        with ThreadPoolExecutor() as side:
            evil = side.submit(lab.kvfarm, "join", lab.address, "--name", "eve", **{token.TOKEN: "wrong"})
            joined = stack.enter_context(lab.serving("has joined", "join", lab.address, "--name", "rack1"))
            refused = evil.result()
        assert refused.returncode == 2
        assert "it refuses our token (that of RAY_AUTH_TOKEN); copy the head's file" in refused.stderr
        head = connect(lab.address, "the test could not look")
        until(lambda: (found := host(head)) is not None and found.state == "ready", lambda: host(head))

        def devices() -> dict[str, str]:
            found = host(head)
            return {name: each.state for name, each in found.record.devices.items()} if found else {}

        assert devices() == {"rack1": "free"}
        adb.state = "device"  # somebody plugs a phone in
        until(lambda: devices() == {"rack1": "free", SERIAL: "free"}, devices)
        adb.state = "absent"
        until(lambda: devices() == {"rack1": "free"}, devices)

        processes = [each for process in (top, joined) for each in _family(process.pid)]
        assert _open_to_others(processes) == []
        words = [_words(each) for each in processes]
        names = " ".join(word for each in words for word in each)
        assert all(part in names for part in ("gcs_server", "raylet", "Agent")), "all of Ray was looked at"
        assert secret not in names
        assert _leaks(secret, [*lab.folder.glob("*.log"), *_logs(words)]) == []

        drain = ["drain", "rack1", "--because", "new hub", "--wait", "5s", "--farm-address", lab.address]
        assert cli.run(drain) == 0
        assert cli.run(["devices", "--watch", "--farm-address", lab.address]) == 0
        watched = capsys.readouterr().out
        assert "drained" in watched
        assert "new hub" in watched
        assert cli.run(["leave"]) == 0
        assert joined.wait(SECONDS) == 0
        assert hosts(head) == ()
    until(lambda: not any(map(_lives, processes)), lambda: [each for each in processes if _lives(each)])


def _open_to_others(processes: list[psutil.Process]) -> list[str]:
    """What somebody else than this machine can reach."""
    return [
        f"{' '.join(_words(each))[:200]} listens on {where.laddr}"
        for each in processes
        for where in _connections(each)
        if where.status == psutil.CONN_LISTEN
        and where.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ]


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
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def _logs(words: list[list[str]]) -> list[Path]:
    """Of the Ray sessions that paths on these command lines lie in."""
    paths = {Path(word.partition("=")[2] or word) for each in words for word in each if scratch.RAY in word}
    tops = {top for each in paths for top in each.parents if top.name.startswith(scratch.RAY)}
    return [path for top in tops for path in top.rglob("*") if path.is_file()]


def _leaks(secret: str, files: list[Path]) -> list[Path]:
    assert len(files) > 10, "Ray's logs were found"
    return [path for path in files if secret.encode() in path.read_bytes()]
