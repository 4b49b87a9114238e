"""One lab host as seen from the harness: its lab agent in a Ray actor, with deadlines on every call."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import kvengine
from device_agents import logs
from device_agents.config import DeviceConfig
from device_agents.errors import DeadlineExceeded, InfrastructureError, RootTaken
from device_agents.lab_agent import LabAgent
from harness.cluster import NAMESPACE
from kvengine.errors import KvEngineError

# Importing kvengine and onnxruntime on a cold disk, and the cluster finding a free slot.
START_S = 120.0
STOP_S = 30.0
AGENT_NAME = "lab-agent-"  # and the node's id: the actor's name
_MOST_AGENTS = 33  # of one folder; each has one Ray
_OWNED_CALLS = 64  # at once, of an agent whose devices come and go
HOST_LABEL = "kvfarm-host"  # of a Ray node: the name it joined with


@dataclass(frozen=True)
class Answer:
    """What a call came to. Errors travel as values: Ray would wrap them and lose their type."""

    value: Any = None
    ended: bool = False  # the agent was stopped, by its last user or for another farm.toml
    error: KvEngineError | InfrastructureError | None = None


class AgentGone(InfrastructureError):
    """A lab agent has died or was stopped: it answers no further call."""


def answer_of(promise: Any, what: str, seconds: float) -> Any:
    """What a call of a lab agent came to. what: for messages, the call and whose agent it is.

    Raises:
        KvEngineError, InfrastructureError: as the agent raised them.
        DeadlineExceeded: no answer in ``seconds``. AgentGone. InfrastructureError: the agent failed.
    """
    try:
        answer: Answer = ray.get(promise, timeout=seconds)
    except GetTimeoutError:
        raise DeadlineExceeded(f"{what} gave no answer within {seconds:g} s") from None
    except RayActorError as error:
        raise AgentGone(f"{what} died: {error}") from error
    except RayError as error:  # also RayTaskError: a bug in the agent, with its traceback
        raise InfrastructureError(f"{what}: {error}") from error
    if answer.ended:
        raise AgentGone(f"{what} has ended")
    if answer.error is not None:
        raise answer.error
    return answer.value


class LabActor:
    """Lives in the actor's process on the lab host and holds the LabAgent there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._agent: LabAgent | None = None
        self._configs: dict[str, DeviceConfig] = {}
        self._owned = False

    def start(self, root: Path | None, configs: Sequence[DeviceConfig], own: bool = False) -> Answer:
        """Start the agent, or let the one that runs have these devices too; returns kvfarm's version here.

        own: for the lab host itself: only ``stop(even_if_leased=True)`` ends it from now on.
        """
        with self._lock:
            try:
                logs.set_up()  # to where the variable says that the actor's process inherits
                self._start(root, configs)
            except InfrastructureError as error:
                return Answer(error=error)
            self._owned = self._owned or own
            return Answer(value=kvengine.__version__)

    def _start(self, root: Path | None, configs: Sequence[DeviceConfig]) -> None:
        other = [c.name for c in configs if c.name in self._configs and self._configs[c.name] != c]
        if self._agent is not None and other:
            if self._agent.in_use or self._owned:
                raise InfrastructureError(
                    f"the agent of this lab host is in use with a farm.toml that describes device "
                    f"{other[0]!r} otherwise; wait until it is idle, or use the same farm.toml"
                )
            agent, self._agent = self._agent, None
            agent.shutdown()
        if self._agent is None:
            self._configs = {}
            self._agent = _agent_in(root or cache_folder() / "lab", configs)
        self._agent.add(configs)
        self._configs |= {config.name: config for config in configs}

    def call(self, method: str, arguments: tuple[Any, ...]) -> Answer:
        """A method of LabAgent."""
        agent = self._agent
        if agent is None:
            return Answer(ended=True)
        try:
            return Answer(value=getattr(agent, method)(*arguments))
        except (KvEngineError, InfrastructureError) as error:
            return Answer(error=error)

    def stop(self, even_if_leased: bool) -> Answer:
        """Shut the agent down unless somebody holds a lease; says whether it did."""
        with self._lock:
            if self._agent is None:
                return Answer(value=True)
            if not even_if_leased and (self._owned or self._agent.in_use):
                return Answer(value=False)
            agent, self._agent = self._agent, None
        agent.shutdown()
        return Answer(value=True)


@dataclass(frozen=True)
class Node:
    """A machine of the Ray cluster."""

    id: str
    address: str


def here() -> Node:
    """This machine."""
    return Node(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())


def find_node(lab: str, wanted: str) -> Node:
    """The living node that joined as ``wanted``; else the one of that address or host name.

    Raises:
        InfrastructureError: there is none; the message lists those there are.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    joined = [node for node in nodes if node.get("Labels", {}).get(HOST_LABEL) == wanted]
    addressed = [n for n in nodes if wanted in (n["NodeManagerAddress"], n["NodeManagerHostname"])]
    # Where the head's machine is a lab host too, that is the node that joined.
    addressed.sort(key=lambda node: HOST_LABEL not in node.get("Labels", {}))
    for node in joined + addressed:
        return Node(node["NodeID"], node["NodeManagerAddress"])
    known = ", ".join(sorted(n.get("Labels", {}).get(HOST_LABEL, n["NodeManagerAddress"]) for n in nodes))
    raise InfrastructureError(
        f"lab host {lab!r}: sought node {wanted} in the Ray cluster, found {known}; `kvfarm join` "
        "there, give --farm-address, or correct farm.toml"
    )


class Lab:
    """The lab agent of one lab host.

    node: where it is started; another one once the host has joined anew.
    root: the agent's folder there; None is its own choice. detached: in a joined cluster the agent
    must outlive who asked for it first. shared: it may have other users, so it ends with the last one.
    guest: for a worker of a run, whose controller, the host, ends it, whoever started it.
    """

    actor: type[LabActor] = LabActor

    def __init__(
        self,
        name: str,
        node: Node,
        root: Path | None,
        *,
        detached: bool,
        shared: bool,
        guest: bool = False,
    ) -> None:
        self.name = name
        self.node = node
        self._root = root
        self._detached = detached
        self._shared = shared
        self._guest = guest
        self.host = False
        self.shipping = threading.Lock()  # held while an artifact travels there
        self._actor: Any = None

    @property
    def running(self) -> bool:
        """Whether the agent was started and has not died since."""
        return self._actor is not None

    def start(self, configs: Sequence[DeviceConfig], own: bool = False) -> None:
        """Start the agent, or join the one that runs there. own: see LabActor.

        Raises:
            InfrastructureError: it does not start, is of another version, or has other devices.
        """
        # One agent a machine, started by whoever asks first.
        self._actor = (
            ray.remote(self.actor)
            .options(
                name=self._actor_name,
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached" if self._detached else None,
                num_cpus=0,  # it waits for devices; Ray's CPUs mean nothing here
                max_concurrency=max(_OWNED_CALLS if own else 0, 4 + 4 * len(configs)),
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self.node.id, soft=False),
            )
            .remote()
        )
        try:
            actor = self._actor
            promise = actor.start.remote(self._root, tuple(configs), own)
            version = self._answer(actor, promise, "start", START_S)
            if version != kvengine.__version__:
                raise InfrastructureError(
                    f"lab host {self.name} ({self.node.address}) has kvfarm {version}, here is "
                    f"{kvengine.__version__}; install the same on both"
                )
        except BaseException:
            self.close()
            raise

    def call(self, method: str, seconds: float, *arguments: Any) -> Any:
        """``LabAgent.method(*arguments)`` on the lab host.

        Raises:
            KvEngineError, InfrastructureError: as the agent raised them.
            DeadlineExceeded: no answer in ``seconds``.
            InfrastructureError: the agent died; ``running`` is False from now on.
        """
        actor = self._actor
        if actor is None:
            raise InfrastructureError(f"{method}: the agent of lab host {self.name} is not running")
        return self._answer(actor, actor.call.remote(method, arguments), method, seconds)

    def begin(self, method: str, *arguments: Any) -> None:
        """As ``call``, without waiting for the answer, whatever it is."""
        if self._actor is not None:
            self._actor.call.remote(method, arguments)

    def close(self) -> None:
        """End the agent, with all its sessions; one that others use goes on without us. Never raises."""
        actor, self._actor = self._actor, None
        if self.host:
            actor = self._found()
        if actor is None or self._guest:
            return
        stopped = not self._shared
        with contextlib.suppress(InfrastructureError):
            stopped = self._answer(actor, actor.stop.remote(not self._shared), "stop", STOP_S)
        if stopped:
            # The agent's runners are ended; what is left is an empty process.
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)

    def find(self) -> bool:
        """Whether an agent runs there; if so it is used from now on."""
        self._actor = self._found()
        return self.running

    @property
    def _actor_name(self) -> str:
        return f"{AGENT_NAME}{self.node.id}"

    def _found(self) -> Any:
        try:
            return ray.get_actor(self._actor_name, NAMESPACE)
        except (ValueError, RayError):
            return None

    def _forget(self, actor: Any) -> None:
        """Unless somebody else has started another one by now."""
        if self._actor is actor:
            self._actor = None

    def _answer(self, actor: Any, promise: Any, what: str, seconds: float) -> Any:
        try:
            who = f"the agent of lab host {self.name} ({self.node.address})"
            return answer_of(promise, f"{what}: {who}", seconds)
        except AgentGone as error:
            self._forget(actor)
            if isinstance(error.__cause__, RayActorError) and not isinstance(
                error.__cause__, ActorUnavailableError
            ):
                # Else this process finds the dead one by its name again, for as long as it lives.
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(actor)
            raise


def _agent_in(root: Path, configs: Sequence[DeviceConfig]) -> LabAgent:
    """An agent in ``root``, or beside it where another run has that: what they share is the leases alone."""
    for number in range(2, _MOST_AGENTS):
        with contextlib.suppress(RootTaken):
            return LabAgent(root, configs, leases=leases_folder())
        root = root.with_name(f"{root.name.partition('-')[0]}-{number}")
    raise InfrastructureError(
        f"more than {_MOST_AGENTS} lab agents run beside {root}; end some of their runs"
    )


def leases_folder() -> Path:
    """Where all lab agents of this machine and user keep their leases; KVFARM_LEASES names another.

    On each lab host there is one such journal, for its own devices, and no service for the whole cluster: a
    service would be one more thing that can die, has to tell agents of every lease that ends, and would
    not exist for the private Ray of a plain pytest. So the journal is where the devices are, and its order
    is that of the machine's file lock. A set over several hosts is taken host by host in the order of their
    names, all at once inside each (Farm): a total order, so nobody waits in a circle or has to back off.
    """
    named = os.environ.get("KVFARM_LEASES")
    return Path(named) if named else cache_folder() / "leases"


def cache_folder() -> Path:
    """Of the user it runs as: where an agent that serves a lab has its own."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfarm"
