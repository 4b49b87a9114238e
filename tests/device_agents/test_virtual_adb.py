"""The adb server of our own, and the filter that keeps adbd off vsock."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure
from device_agents.virtual import namespaces as ns
from device_agents.virtual.adb import PrivateAdbServer, find_adb
from tests.device_agents.virtual_support import ROOT, alive, listening, tree, wait_for


@pytest.fixture
def server() -> Iterator[PrivateAdbServer]:
    with PrivateAdbServer() as started:
        yield started


def test_vsock_which_knows_no_namespaces_is_closed_to_the_phone() -> None:
    """Its filter, in a process of its own: adbd says that it listens there even when it does not."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            ns.forbid_vsock()
            socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close()
            try:
                socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
            except OSError as error:
                code = 0 if error.errno == 97 else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_private_adb_server_listens_on_loopback_alone_and_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os\nfrom device_agents.virtual.adb import *\nserver = PrivateAdbServer()\n"
        "server.start(Deadline(30))\nprint(server.port, server._stream.pid, flush=True)\ninput()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    ) as child:
        assert child.stdout is not None
        port, keeper = map(int, child.stdout.readline().split())
        processes = tree(keeper)
        assert len(processes) == 2
        assert listening(processes) == {f"127.0.0.1:{port}"}
        child.kill()
        wait_for(lambda: not any(map(alive, processes)), 3, "the adb server's end")
    assert list(tmp_path.iterdir()) == []  # no key of its own in the user's home


def test_a_silent_phone_is_not_connected_to(server: PrivateAdbServer) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(AdbFailure, match=address):
            server.connect(address, Deadline(1))


def test_find_adb_prefers_what_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_adb()
    monkeypatch.setenv("ADBUTILS_ADB_PATH", found[-1])
    assert find_adb() == (found[-1],)
    monkeypatch.setenv("ADBUTILS_ADB_PATH", "/bin/false")
    assert find_adb() == found
