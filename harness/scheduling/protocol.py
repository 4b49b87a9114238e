"""The seam between what is to be done and what does it. Pure: no clock, no thread, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Job:
    """One piece of work for one device.

    id: unique. seconds: how long it is expected to take; only compared with that of other jobs.
    devices: it may run on any one of these; empty: on any there is.
    """

    id: str
    seconds: float = 0.0
    devices: frozenset[str] = frozenset()

    def fits(self, device: str) -> bool:
        return not self.devices or device in self.devices


class Scheduler(Protocol):
    """Gives each job to one device at a time. Not thread-safe: whoever shares one has a lock."""

    def add(self, job: Job) -> None:
        """Raises ValueError: a job of this id is there already."""
        ...

    def join(self, device: str) -> None:
        """The device is there from now on."""
        ...

    def leave(self, device: str) -> None:
        """It gets nothing more. What it has taken stays taken until ``done`` or ``lost``."""
        ...

    def take(self, device: str) -> Job | None:
        """What the device is to do next; None: nothing now, but what others lose may still come.

        A job that infrastructure stopped on a device goes to another one as long as there is one.
        """
        ...

    def done(self, job_id: str) -> None:
        """The job has its result. Raises KeyError: nobody has taken it."""
        ...

    def lost(self, job_id: str) -> bool:
        """Infrastructure stopped it. True: it waits to be tried again; False: it has had all its tries.

        Raises KeyError: nobody has taken it.
        """
        ...

    def stranded(self) -> tuple[Job, ...]:
        """Takes out, and returns, the jobs that wait and that no device is there for."""
        ...

    @property
    def unfinished(self) -> int:
        """Jobs that wait or are taken."""
        ...
