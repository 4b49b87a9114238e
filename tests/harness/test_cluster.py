"""Ray is joined with plain errors, and its leftovers are cleaned up. (Really started in tests/e2e.)"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from device_agents.errors import DeadlineExceeded, InfrastructureError
from device_agents.scratch import RAY
from harness import cluster, reaching
from harness.reaching import Address


@contextmanager
def listener(says: bytes) -> Iterator[str]:
    """The address of something that takes one connection, says this and waits for the other side to end."""

    def serve() -> None:
        connection, _ = server.accept()
        with connection, suppress(ConnectionError):
            connection.sendall(says)
            while connection.recv(1024):
                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(30)


@pytest.mark.parametrize("address", ["lab1", "ray://lab1:10001", "lab1:", ""])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InfrastructureError, match="sought HOST:PORT"):
        cluster.ensure_ray(address)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Version mismatch: The cluster was started with:\nRay: 2.9"), ConnectionError("no")],
)
def test_a_cluster_that_refuses_us_is_an_infrastructure_error_with_both_versions(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr("ray.init", refuse)
    found = SimpleNamespace(address=Address("127.0.0.1", 6379))
    monkeypatch.setattr(cluster, "connect", lambda text, what: found)
    monkeypatch.setattr(cluster, "find_node_ids", lambda: ["a node"])
    with pytest.raises(InfrastructureError, match=r"could not join .*here: Ray 2\..*Python 3\."):
        cluster.ensure_ray("127.0.0.1:6379")


def test_a_machine_without_a_ray_node_is_told_to_join_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(address=Address("127.0.0.1", 6379))
    monkeypatch.setattr(cluster, "connect", lambda text, what: found)
    monkeypatch.setattr(cluster, "find_node_ids", list)
    with pytest.raises(InfrastructureError, match=r"no Ray node; `kvfarm join .*:6379 --no-devices`"):
        cluster.ensure_ray("127.0.0.1:6379")


def test_what_takes_connections_and_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaching, "CONNECT_S", 0.2)
    with listener(b"") as address, pytest.raises(DeadlineExceeded, match=r"says nothing for 0\.2 s"):
        cluster.ensure_ray(address)


def test_another_kind_of_server_is_no_ray() -> None:
    says = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with listener(says) as address, pytest.raises(InfrastructureError, match=r"no Ray: .*HTTP/1\.1"):
        cluster.ensure_ray(address)


def test_a_ray_that_does_not_start_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise Exception("no space for the object store")

    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(InfrastructureError, match="no space for the object store"):
        cluster.ensure_ray()
    assert list(Path("/tmp").glob(f"{RAY}{os.getpid()}-*")) == []


def test_folders_of_killed_processes_are_removed_and_those_of_living_ones_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(60)
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        monkeypatch.setattr(tempfile, "tempdir", base)
        stale = Path(base, f"{RAY}{ended.pid}-abc")
        mine = Path(base, f"{RAY}{os.getpid()}-abc")
        stale.mkdir()
        mine.mkdir()
        new = cluster.new_folder()
        assert not stale.exists()
        assert mine.exists()
        assert new.parent == Path(base)


@pytest.mark.parametrize(
    ("host", "is_it"),
    [("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("192.0.2.1", False), ("lab1", False)],
)
def test_loopback_addresses(host: str, is_it: bool) -> None:
    assert reaching.is_loopback(host) is is_it
