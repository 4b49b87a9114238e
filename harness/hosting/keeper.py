"""One stay of a lab host in the cluster: its Ray node, its lab agent, and what it tells the others.

Runs in a process of its own (``python -m harness.hosting.keeper``, started by
harness.hosting.supervisor), for Ray cannot be started twice in one process after its head has died.
Options come as one line of JSON on stdin; when stdin ends, whoever started us is gone, and so are we.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

import psutil

from device_agents.adb.connection import AdbServer
from device_agents.adb.plugged import Plugged
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError, LeaseError
from device_agents.leases import protocol
from device_agents.leases.ledger import Ledger
from harness.cluster import ensure_ray
from harness.errors import HarnessError, HostTaken, NotAuthenticated, TooOpen, VersionMismatch
from harness.hosting.head import Head, connect, versions
from harness.hosting.node import Ports, RayNode, start_host
from harness.hosting.offer import Offer
from harness.hosting.records import HOSTS, ORDERS, PUBLISH_S, HostRecord, Order, hosts
from harness.lab import HOST_LABEL, Lab, Node, leases_folder
from kvengine.codec import decode
from kvengine.errors import KvEngineError

LEFT, REFUSED, LOST = 0, 2, 75  # exit codes; 75 is EX_TEMPFAIL of sysexits.h
_SILENT_S = 60.0  # without its head a raylet gives up after a minute, too
_ASK_AGENT_S = 5.0
_ABANDON_S = 10.0
_NAME_S = 30.0  # the cluster takes a node that was killed for alive for up to 20 s
_LASTING = (HarnessError, NotAuthenticated, VersionMismatch, TooOpen, HostTaken)


class Lost(InfrastructureError):
    """This stay is over: the head, or our node, is gone; another may begin."""


@dataclass(frozen=True)
class Options:
    """As `kvfarm join` was told. head: HOST:PORT. listen: our own address. ports: FIRST-LAST or "".

    farm: path of its farm.toml; "": none. devices: whether it offers any.
    """

    name: str
    head: str
    listen: str
    ports: str = ""
    every_interface: bool = False
    farm: str = ""
    devices: bool = True


class Keeper:
    """Of one stay: ``turn`` is called every second. Made by ``stay``."""

    def __init__(self, options: Options, head: Head, node: RayNode, lab: Lab, plugged: Plugged) -> None:
        self._options = options
        self._head = head
        self._node = node
        self._lab = lab
        self._offer = Offer.read(options.name, options.farm, options.devices)
        self._plugged = plugged
        self._ledger = Ledger(leases_folder())
        self._since = time.time()
        self._followed = ""  # id of the last order
        self._heard = time.monotonic()  # from the head
        self._agent_asked = 0.0
        self._holders: dict[str, str] = {}

    def turn(self) -> None:
        """Look after everything once. Raises Lost."""
        if dead := self._node.dead():
            raise Lost(f"of this host's Ray node {', '.join(dead)} has ended")
        self._hold_to_limits()
        self._look_after_agent()
        try:
            self._follow_orders()
            self._head.put(HOSTS + self._options.name, self._record())
            if self._node.id not in self._head.alive():
                raise Lost("the head takes this host for dead")
            self._heard = time.monotonic()
        except Lost:
            raise
        except InfrastructureError as error:
            self._reconnect(error)

    def claim_name(self) -> None:
        """That nobody else has our name or one of our devices' names. Raises HostTaken."""
        deadline, pause, name = Deadline(_NAME_S), threading.Event(), self._options.name
        while True:
            others = [
                host.record for host in hosts(self._head) if host.alive and host.record.node != self._node.id
            ]
            same = [record for record in others if record.name == name]
            if not same:
                break
            if same[0].address != self._options.listen or deadline.expired:
                raise HostTaken(f"another lab host, at {same[0].address}, is called {name}; give --name")
            pause.wait(PUBLISH_S)  # our own, killed, and not yet missed
        for record in others:
            if twice := sorted(set(record.devices) & set(self._offer.names())):
                raise HostTaken(
                    f"device {twice[0]} is at lab host {record.name} already; rename it in farm.toml"
                )

    def own_agent(self) -> None:
        """Start the lab agent with all our devices. Raises InfrastructureError."""
        self._lab.start(self._offer.configs(), own=True)

    def abandon(self, error: Lost) -> NoReturn:
        """End this process and all of Ray at once: taking leave of a head that is gone takes minutes.

        Leases stay in their journal; the agent of the next stay, in the same folder, knows them.
        """
        _say(str(error))
        ours = psutil.Process().children(recursive=True)
        self._node.stop(at_once=True)
        _, left = psutil.wait_procs(ours, _ABANDON_S)  # an agent ends its runners
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(LOST)

    def leave(self) -> None:
        """Nobody sees us any more. Never raises."""
        try:
            self._head.delete(HOSTS + self._options.name)
        except InfrastructureError as error:
            _say(str(error))

    # -- inside ---------------------------------------------------------------------------

    def _record(self) -> HostRecord:
        states, error = self._plugged.now()
        return HostRecord(
            name=self._options.name,
            address=self._options.listen,
            node=self._node.id,
            versions=versions(),
            system=platform.platform(terse=True),
            since=self._since,
            seen=time.time(),
            devices=self._offer.devices(states, self._holders),
            pools=self._offer.pools(),
            owner=self._offer.owner,
            drained=self._ledger.state()[0].drained,
            adb=error if self._offer.wants_adb else "",
        )

    def _follow_orders(self) -> None:
        order = self._head.get(Order, ORDERS + self._options.name)
        if order is not None and order.id != self._followed:
            self._ledger.act(protocol.drain(order.by, order.why if order.drain else ""))
            self._followed = order.id

    def _look_after_agent(self) -> None:
        """It runs, has the phones that came, and says who holds what."""
        if not self._options.devices or time.monotonic() - self._agent_asked < PUBLISH_S:
            return
        self._agent_asked = time.monotonic()
        new = self._offer.adopt(self._plugged.now()[0])
        try:
            if not self._lab.running:
                self.own_agent()
            if new:
                self._lab.call("add", _ASK_AGENT_S, new)
            leases = self._lab.call("leases", _ASK_AGENT_S)
            self._holders = {lease.device: lease.holder for lease in leases}
        except InfrastructureError as error:
            _say(f"the lab agent: {error}")

    def _hold_to_limits(self) -> None:
        limit_s = self._offer.limits.longest_lease_s
        try:
            state, now = self._ledger.state()
            for held in state.held.values():
                if not held.ended and now - held.since > limit_s:
                    why = f"this lab host lends for {limit_s:g} s at most"
                    self._ledger.act(protocol.end(held.device, held.token, why))
        except InfrastructureError as error:  # a full disk; leases end when there is room again
            _say(str(error))

    def _reconnect(self, error: InfrastructureError) -> None:
        """The head may be slow, cut off, or another one by now. Raises Lost."""
        silent_s = time.monotonic() - self._heard
        if silent_s > _SILENT_S:
            raise Lost(f"nothing from the head for {silent_s:.0f} s: {error}") from error
        try:
            self._head = connect(self._options.head, "could not reach the head again")
            known = self._node.id in self._head.alive()
        except InfrastructureError:
            return
        if not known:
            raise Lost("the head was started again") from error


@contextmanager
def stay(options: Options) -> Iterator[Keeper]:
    """A node of the cluster with its agent for as long as the body runs.

    Raises:
        NotAuthenticated, VersionMismatch, TooOpen, HostTaken, InventoryError: as long as nobody does
        something. InfrastructureError: for now.
    """
    what = f"could not join the Ray cluster at {options.head}"
    head = connect(options.head, what)
    with ExitStack() as undo:
        ports = Ports.parse(options.ports) if options.ports else None
        labels = {HOST_LABEL: options.name}
        node = start_host(options.head, options.listen, ports, options.every_interface, labels)
        undo.callback(node.stop)
        undo.enter_context(ensure_ray(options.head))
        lab = Lab(options.name, Node(node.id, options.listen), None, detached=True, shared=False)
        undo.callback(lab.close)
        plugged = Plugged(AdbServer.default())
        undo.callback(plugged.stop)
        keeper = Keeper(options, head, node, lab, plugged)
        keeper.claim_name()
        plugged.start()
        if options.devices:
            keeper.own_agent()
        undo.callback(keeper.leave)
        yield keeper


def main() -> int:
    """See the module."""
    options = decode(Options, json.loads(sys.stdin.readline()))
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    threading.Thread(target=_until_orphaned, args=(stopped,), daemon=True).start()
    try:
        with stay(options) as keeper:
            _say(f"{options.name} has joined {options.head} as {options.listen}")
            while not stopped.is_set():
                try:
                    keeper.turn()
                except Lost as error:
                    keeper.abandon(error)
                stopped.wait(PUBLISH_S)
    except _LASTING as error:
        _say(str(error))
        return REFUSED
    except (InfrastructureError, LeaseError, KvEngineError) as error:
        _say(str(error))
        return LEFT if stopped.is_set() else LOST
    return LEFT


def _until_orphaned(stopped: threading.Event) -> None:
    sys.stdin.read()
    stopped.set()


def _say(text: str) -> None:
    """A line for people and the system's journal; our standard error is that of `kvfarm join`."""
    sys.stderr.write(f"kvfarm: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
