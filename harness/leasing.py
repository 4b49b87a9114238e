"""Getting leases from this side: in line until all devices are granted, and saying why it takes so long."""

from __future__ import annotations

import getpass
import math
import os
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError, LeaseError, LeaseNotGranted
from device_agents.lab_types import Lease, Standing
from device_agents.leases.model import Request
from device_agents.leases.process import this_process
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.lab import Lab

BEAT_S = 30.0
CALL_S = 30.0  # the agent answers at once, unless it stops what a lease before ours left running
_POLL_S = 0.5
_MOST_REASONS = 3
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float:
    """Seconds of 90, 90s, 20m or 1.5h. Raises HarnessError: it is none of these."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        found = float(number) * _UNITS[unit]
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise HarnessError(f"sought a time such as 90s, 20m or 1.5h, found {text!r}")
    return found


def user_name() -> str:
    """Who runs this."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return f"uid-{os.getuid()}"


def holder(pid: int, user: str | None = None) -> str:
    """How a lease names a process of this machine."""
    return f"{user or user_name()}@{socket.gethostname()} pid {pid}"


@dataclass(frozen=True)
class Terms:
    """On which devices are leased. priority: higher is first. wait_s: in line at most. beat_s: who is silent
    for so long is taken for dead. limit_s: the longest lease. run: that they are for, "" for none.
    repair: also devices in quarantine."""

    user: str = field(default_factory=user_name)
    priority: int = 0
    wait_s: float = 3600.0
    beat_s: float = BEAT_S
    limit_s: float = 24 * 3600.0
    run: str = ""
    repair: bool = False


def lease(
    lab: Lab,
    names: tuple[str, ...],
    count: int,
    terms: Terms,
    deadline: Deadline,
    on_wait: Callable[[str], None],
    restart: Callable[[], object],
) -> tuple[Lease, ...]:
    """``count`` of the devices of one lab host, all at once.

    on_wait: called with the reason while others are before us. restart: starts the lab agent again.

    Raises:
        LeaseNotGranted: not by ``deadline``; says of each device why. LeaseError: never.
        InfrastructureError: the lab agent does not answer.
    """
    request = Request(
        id=uuid.uuid4().hex,
        user=terms.user,
        holder=holder(os.getpid(), terms.user),
        devices=names,
        count=count,
        priority=terms.priority,
        limit_s=terms.limit_s,
        beat_s=terms.beat_s,
        client=this_process(),
        run=terms.run,
        repair=terms.repair,
    )
    pause = threading.Event()
    try:
        while not (standing := _ask(lab, request, restart)).granted:
            if deadline.expired:
                raise LeaseNotGranted(f"waited {deadline.seconds:g} s: {_reason(standing)}")
            on_wait(f"waits: {_reason(standing)}")
            pause.wait(min(_POLL_S, deadline.remaining))
        return standing.granted
    except BaseException:
        with suppress(InfrastructureError):
            lab.call("withdraw", CALL_S, request.id)
        raise


def _ask(lab: Lab, request: Request, restart: Callable[[], object]) -> Standing:
    try:
        found: Standing = lab.call("ask", CALL_S, request)
    except LeaseError:
        raise
    except InfrastructureError:
        if lab.running:
            raise
        restart()  # our place in line is in its journal
        found = lab.call("ask", CALL_S, request)
    return found


def _reason(standing: Standing) -> str:
    # Of a large set, those that keep it.
    in_the_way = [each for each in standing.why if " is free, " not in each]
    more = len(in_the_way) - _MOST_REASONS
    reasons = "; ".join(in_the_way[:_MOST_REASONS]) + (f"; and {more} more" if more > 0 else "")
    line = f" (in line behind {', '.join(standing.ahead)})" if standing.ahead else ""
    return reasons + line
