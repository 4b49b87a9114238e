"""Whether a device that does not answer is started anew, and how: a reboot first, then its power."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from device_agents.errors import InfrastructureError
from device_agents.leases.model import How

if TYPE_CHECKING:
    from harness.farm import Farm

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestartPolicy:
    """How often a day at most, by all runs together; the lease journal counts. By default never: a phone may
    be somebody's own."""

    reboots: int = 0
    power_cycles: int = 0


class Restarter:
    """by: who asks, for the audit log."""

    def __init__(self, farm: Farm, policy: RestartPolicy, by: str) -> None:
        self._farm, self._policy, self._by = farm, policy, by

    def __call__(self, device: str, why: str) -> str:
        """How it was restarted, "" if nothing could, or may once more today."""
        ways: tuple[tuple[How, int], ...] = (
            ("reboot", self._policy.reboots),
            ("power-cycle", self._policy.power_cycles),
        )
        for how, most in ways:
            if most > 0:
                try:
                    self._farm.restart(device, how, self._by, why, most)
                except InfrastructureError as error:
                    _log.warning("%s: no %s: %s", device, how, error)
                else:
                    return how
        return ""
