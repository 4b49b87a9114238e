"""The words of leases: what is asked, what is written down (facts), and the state that facts add up to.

Plain frozen data. Seconds are those of the clock of whoever calls; facts carry none, their journal does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Rules:
    """beat_s: longest time without a heartbeat. limit_s: longest lease. ageing_s: to wait so long is worth
    one step of priority. half_life_s: after so long past use counts half when users are compared."""

    beat_s: float = 24 * 3600.0
    limit_s: float = 24 * 3600.0
    ageing_s: float = 300.0
    half_life_s: float = 3600.0


@dataclass(frozen=True)
class Process:
    """A process of the machine and PID namespace ``host``. started: ticks since boot; PIDs come again."""

    host: str
    pid: int
    started: int


@dataclass(frozen=True)
class Request:
    """``count`` of ``devices``, all at once or none.

    id: unique; the same request twice is one. holder: who exactly, for people. priority: higher is first.
    limit_s: the longest it may keep them. beat_s: it has died when it is silent for so long. agent: the lab
    agent it came through, which does the work. client: the process that asked, where it is known. run: that
    it is for, "" for none. repair: devices in quarantine too, for whoever sees to them.
    """

    id: str
    user: str
    holder: str
    devices: tuple[str, ...]
    count: int = 1
    priority: int = 0
    limit_s: float = 24 * 3600.0
    beat_s: float = 30.0
    agent: str = ""
    client: Process | None = None
    run: str = ""
    repair: bool = False


@dataclass(frozen=True)
class Booted:
    """The machine started, or the journal begins: nothing is held. token: the last maybe given."""

    boot: str
    token: int
    kind: Literal["booted"] = "booted"


@dataclass(frozen=True)
class Started:
    """A lab agent started, maybe again: nothing runs on its devices, and its clients get time to find it."""

    agent: str
    process: Process
    kind: Literal["started"] = "started"


@dataclass(frozen=True)
class Asked:
    request: Request
    kind: Literal["asked"] = "asked"


@dataclass(frozen=True)
class Withdrawn:
    """Waits no more, and was not granted."""

    id: str
    why: str
    kind: Literal["withdrawn"] = "withdrawn"


@dataclass(frozen=True)
class Granted:
    """token: larger than any given before."""

    id: str
    token: int
    devices: tuple[str, ...]
    kind: Literal["granted"] = "granted"


@dataclass(frozen=True)
class Beat:
    """A sign of life. beat_s: the request's from now on, if not None."""

    id: str
    beat_s: float | None = None
    kind: Literal["beat"] = "beat"


@dataclass(frozen=True)
class Ended:
    """The token is refused from now on; the device is not free before it is clean."""

    device: str
    token: int
    why: str
    kind: Literal["ended"] = "ended"


@dataclass(frozen=True)
class Freed:
    """Nothing of the ended lease runs on the device any more."""

    device: str
    token: int
    kind: Literal["freed"] = "freed"


@dataclass(frozen=True)
class Quarantined:
    """Not granted to anybody. seconds: None is until somebody lifts it."""

    device: str
    evidence: str
    by: str
    seconds: float | None
    kind: Literal["quarantined"] = "quarantined"


@dataclass(frozen=True)
class Lifted:
    device: str
    by: str
    kind: Literal["lifted"] = "lifted"


How = Literal["reboot", "power-cycle"]


@dataclass(frozen=True)
class Restarted:
    """Somebody is about to start the device anew, within the day's limits."""

    device: str
    how: How
    by: str
    why: str
    kind: Literal["restarted"] = "restarted"


@dataclass(frozen=True)
class Drained:
    """The lab host grants nothing from now on; what is held goes on. why: "" ends that."""

    by: str
    why: str
    kind: Literal["drained"] = "drained"


@dataclass(frozen=True)
class Waiting:
    request: Request
    since: float
    beat: float


@dataclass(frozen=True)
class Held:
    """A device on lease. ended: why it is no more, while it is not yet clean."""

    device: str
    token: int
    request: Request
    since: float
    beat: float
    ended: str = ""

    @property
    def until(self) -> float:
        """Unless it is given back or dies before."""
        return self.since + self.request.limit_s


@dataclass(frozen=True)
class Quarantine:
    evidence: str
    by: str
    until: float | None


@dataclass(frozen=True)
class Restart:
    how: How
    at: float


@dataclass(frozen=True)
class State:
    """All that is known at time ``at``. used: by user, past device-seconds, and when they were counted.
    restarts: of the last day, by device. drained: by whom and why nothing is granted; "": it is.
    """

    at: float = 0.0
    token: int = 0
    boot: str = ""
    waiting: dict[str, Waiting] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    quarantined: dict[str, Quarantine] = field(default_factory=dict)
    used: dict[str, tuple[float, float]] = field(default_factory=dict)
    agents: dict[str, Process] = field(default_factory=dict)
    restarts: dict[str, tuple[Restart, ...]] = field(default_factory=dict)
    drained: str = ""

    def of(self, id_: str) -> tuple[Held, ...]:
        """What the request holds, without what has ended."""
        return tuple(held for held in self.held.values() if held.request.id == id_ and not held.ended)


@dataclass(frozen=True)
class Snapshot:
    """What all facts before came to; a journal that grew too long begins with it."""

    state: State
    kind: Literal["snapshot"] = "snapshot"


Fact = (
    Booted
    | Started
    | Asked
    | Withdrawn
    | Granted
    | Beat
    | Ended
    | Freed
    | Quarantined
    | Lifted
    | Restarted
    | Drained
    | Snapshot
)
Facts = tuple[Fact, ...]
