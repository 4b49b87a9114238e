"""The lab agents of a Ray cluster as a source of the live page."""

from __future__ import annotations

from collections.abc import Sequence

from device_agents.api import Vitals
from device_agents.observing import Observed
from harness import watching
from harness.watching import Agent


class LabAgents:
    """Those that run in the cluster that this process has joined; none is started. See gathering.Source."""

    def __init__(self, address: str) -> None:
        self.name = f"lab agents of {address}"
        self._agents: dict[str, Agent] = {}  # by lab host

    def observed(self) -> Sequence[Observed]:
        found = [(agent, agent.observe()) for agent in watching.agents()]
        self._agents = {observed.host: agent for agent, observed in found}
        return [observed for _, observed in found]

    def vitals(self, host: str, device: str) -> Vitals | None:
        agent = self._agents.get(host)
        return None if agent is None else agent.vitals(device)
