"""The lab agents of a Ray cluster, as somebody sees them who only looks: none is started, no device is asked
more than its vitals, and of devices on lease not even those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from device_agents.api import Vitals
from device_agents.errors import InfrastructureError
from device_agents.leases.ledger import Entry
from device_agents.observing import Observed
from harness.cluster import NAMESPACE
from harness.lab import AGENT_NAME, answer_of

_SECONDS = 10.0


@dataclass(frozen=True)
class Agent:
    """A lab agent that runs. Methods raise InfrastructureError: it does not answer in time, or refuses."""

    name: str

    def observe(self) -> Observed:
        found: Observed = self._call("observe")
        return found

    def journal(self) -> tuple[Entry, ...]:
        found: tuple[Entry, ...] = self._call("journal")
        return found

    def vitals(self, device: str) -> Vitals:
        found: Vitals = self._call("vitals", device)
        return found

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            promise = ray.get_actor(self.name, NAMESPACE).call.remote(method, arguments)
        except (ValueError, RayError) as error:
            raise InfrastructureError(f"{self.name}: {error}") from error
        return answer_of(promise, f"{method}: {self.name}", _SECONDS)


def agents() -> tuple[Agent, ...]:
    """Those that run now in the cluster that this process has joined."""
    try:
        found = ray.util.list_named_actors(all_namespaces=True)
    except RayError as error:
        raise InfrastructureError(f"the Ray cluster does not say which lab agents it has: {error}") from error
    names = sorted(each["name"] for each in found if each["namespace"] == NAMESPACE)
    return tuple(Agent(name) for name in names if name.startswith(AGENT_NAME))


def all_entries() -> tuple[Entry, ...]:
    """Of the lease journals of all lab hosts, host by host."""
    return tuple(entry for agent in agents() for entry in agent.journal())
