"""A Ray node of this machine: the head's, or one that joins it. Its processes end with this one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray._private.node import Node
from ray._private.parameter import RayParams

from device_agents.errors import InfrastructureError
from harness.cluster import loopback_only, new_folder, prepare, quietly
from harness.errors import TooOpen
from harness.reaching import Address, is_loopback
from harness.this_machine import OBJECT_STORE_BYTES

_FEWEST_PORTS = 16  # six servers, and a worker for each lab agent, reference and what Ray starts beforehand


@dataclass(frozen=True)
class Ports:
    """From ``first`` to ``last`` for all servers of one node, so that a firewall can name them."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Ports:
        """Of FIRST-LAST. Raises InfrastructureError."""
        first, _, last = text.partition("-")
        found = cls(int(first), int(last)) if first.isdigit() and last.isdigit() else cls(0, 0)
        if not 1024 <= found.first <= found.last - _FEWEST_PORTS + 1 <= 65535 - _FEWEST_PORTS + 1:
            raise InfrastructureError(
                f"sought FIRST-LAST, at least {_FEWEST_PORTS} ports from 1024 to 65535, found {text!r}"
            )
        return found

    def params(self) -> dict[str, int]:
        """As Ray names them."""
        names = (
            "node_manager_port",
            "object_manager_port",
            "metrics_agent_port",
            "metrics_export_port",
            "dashboard_agent_listen_port",
            "runtime_env_agent_port",
        )
        servers = {name: self.first + number for number, name in enumerate(names)}
        return servers | {"min_worker_port": self.first + len(names), "max_worker_port": self.last}


class RayNode:
    """Made by ``start_head`` and ``start_host``; ``stop`` ends its processes."""

    def __init__(self, node: Node, folder: Path) -> None:
        self._node = node
        self._folder = folder
        self.id: str = node.node_id
        self.head: str = node.gcs_address  # HOST:PORT

    def dead(self) -> list[str]:
        """Names of those of its processes that have ended by themselves."""
        return [name for name, _ in self._node.dead_processes()]

    def stop(self, at_once: bool = False) -> None:
        """at_once: without a word to the head."""
        self._node.kill_all_processes(check_alive=False, allow_graceful=not at_once, wait=True)
        shutil.rmtree(self._folder, ignore_errors=True)


def start_head(listen: Address, ports: Ports | None, every_interface: bool) -> RayNode:
    """The cluster's head. Raises InfrastructureError: it does not start. TooOpen."""
    return _start(
        listen.host, ports, every_interface, head=True, gcs_server_port=listen.port, include_dashboard=False
    )


def start_host(
    head: str, listen: str, ports: Ports | None, every_interface: bool, labels: Mapping[str, str]
) -> RayNode:
    """A node of the cluster whose head is at HOST:PORT. Raises as ``start_head``."""
    return _start(listen, ports, every_interface, head=False, gcs_address=head, labels=dict(labels))


def _start(
    listen: str, ports: Ports | None, every_interface: bool, *, head: bool, **params: object
) -> RayNode:
    if not every_interface:
        check_interfaces(listen)
    prepare()
    folder = new_folder()
    chosen = ports.params() if ports else {"dashboard_agent_listen_port": 0}
    try:
        # Else Ray takes 127.0.0.1 for a mistake and listens to the network.
        with quietly(), loopback_only() if is_loopback(listen) else nullcontext():
            node = Node(
                RayParams(
                    node_ip_address=listen,
                    node_name=listen,
                    num_cpus=os.cpu_count(),
                    num_gpus=0,
                    object_store_memory=OBJECT_STORE_BYTES,
                    temp_dir=str(folder),
                    **chosen,
                    **params,
                ),
                head=head,
                shutdown_at_exit=False,
                spawn_reaper=True,
            )
    except Exception as error:  # Ray raises a dozen unrelated classes, bare Exception among them
        shutil.rmtree(folder, ignore_errors=True)
        raise InfrastructureError(f"Ray does not start on {listen}: {str(error).splitlines()[0]}") from error
    return RayNode(node, folder)


def check_interfaces(listen: str, addresses: Callable[[], Mapping[str, list[str]]] | None = None) -> None:
    """That Ray's servers can be reached through the network of ``listen`` only.

    Ray knows two choices: 127.0.0.1, or every interface of the machine (its GrpcServer binds 0.0.0.0 for any
    other address). So with an address of a network that must be the machine's only one besides loopback.

    Raises:
        TooOpen: there are others. InfrastructureError: this machine does not have the address.
    """
    if listen == "127.0.0.1":
        return
    if is_loopback(listen):
        raise TooOpen(
            f"Ray listens on every interface for {listen}; sought 127.0.0.1, or the address of a network"
        )
    interfaces = (addresses or _addresses)()
    ours = {name for name, found in interfaces.items() if listen in found}
    if not ours:
        known = ", ".join(sorted(address for found in interfaces.values() for address in found)) or "none"
        raise InfrastructureError(f"sought an address of this machine, found {listen}; it has {known}")
    others = sorted(f"{name} ({', '.join(found)})" for name, found in interfaces.items() if name not in ours)
    if others:
        raise TooOpen(
            f"Ray would listen not on {listen} alone but also on {'; '.join(others)}, for it knows 127.0.0.1 "
            "and every interface, no third; close its ports there (--ports, see docs/farm.md) and say "
            "--every-interface, or let it have a network namespace of its own"
        )


def _addresses() -> dict[str, list[str]]:
    """Of each interface that is up and leads out of this machine."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    families = {2, 10}  # AF_INET, AF_INET6
    found = {
        name: [each.address.partition("%")[0] for each in listed if each.family in families]
        for name, listed in psutil.net_if_addrs().items()
        if name in up
    }
    return {
        name: addresses
        for name, addresses in found.items()
        if addresses and not all(is_loopback(address) for address in addresses)
    }
