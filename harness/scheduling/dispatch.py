"""Jobs done by devices at the same time, one thread a device, in the order that a scheduler gives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError
from harness.recovery import one_line
from harness.scheduling.protocol import Job, Scheduler

R = TypeVar("R")
IN_A_ROW = 2  # a device that loses so many jobs one after the other gets no more


@dataclass(frozen=True)
class Done(Generic[R]):
    """A job that has its result. retries: each failure of infrastructure after which it was tried again."""

    job: Job
    device: str
    result: R
    retries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lost:
    """A job that infrastructure stopped for good."""

    job: Job
    why: tuple[str, ...]


class Dispatcher(Generic[R]):
    """Runs the jobs of ``scheduler``, which is its alone until ``run`` returns.

    work: does a job on a device; called from that device's thread. keep: stores a result; the device gets
    its next job when it returns, so what is durable then was written before anything else is begun.
    on_end: called after each job, one call at a time.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        devices: Sequence[str],
        work: Callable[[str, Job], R],
        keep: Callable[[Done[R]], None],
        on_end: Callable[[str, Job], None] = lambda device, job: None,
    ) -> None:
        self._scheduler, self._devices = scheduler, devices
        self._work, self._keep, self._on_end = work, keep, on_end
        self._changed = threading.Condition()
        self._why: dict[str, list[str]] = {}
        self._error: BaseException | None = None
        self.lost: list[Lost] = []
        self.set_aside: dict[str, str] = {}  # evidence by device

    def run(self, deadline: Deadline) -> None:
        """Until every job is done or lost.

        Raises:
            DeadlineExceeded: too late; what runs is waited for. What ``keep``, or a bug in ``work``, raises:
            after a result that cannot be kept nothing more is begun.
        """
        for device in self._devices:
            self._scheduler.join(device)
        threads = [
            threading.Thread(target=self._serve, args=(device, deadline), name=device, daemon=True)
            for device in self._devices
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: what runs is finished and kept, nothing more is begun
            self._stop(error)
            raise
        if self._error is not None:
            raise self._error

    def _serve(self, device: str, deadline: Deadline) -> None:
        try:
            in_a_row = 0
            while (job := self._next(device, deadline)) is not None:
                try:
                    result = self._work(device, job)
                except InfrastructureError as error:
                    in_a_row += 1
                    self._failed(device, job, error, in_a_row >= IN_A_ROW)
                else:
                    in_a_row = 0
                    self._keep(Done(job, device, result, tuple(self._why.get(job.id, ()))))
                    self._finished(device, job)
        except BaseException as error:
            self._stop(error)

    def _next(self, device: str, deadline: Deadline) -> Job | None:
        with self._changed:
            while self._error is None and self._scheduler.unfinished and device not in self.set_aside:
                if deadline.expired:
                    raise DeadlineExceeded(
                        f"{self._scheduler.unfinished} jobs are not done after {deadline.seconds:g} s"
                    )
                job = self._scheduler.take(device)
                if job is not None:
                    return job
                self._changed.wait(deadline.remaining)
            return None

    def _finished(self, device: str, job: Job) -> None:
        with self._changed:
            self._scheduler.done(job.id)
            self._why.pop(job.id, None)
            self._on_end(device, job)
            if not self._scheduler.unfinished:
                self._changed.notify_all()

    def _failed(self, device: str, job: Job, error: InfrastructureError, for_good: bool) -> None:
        with self._changed:
            why = self._why.setdefault(job.id, [])
            why.append(f"on {device}: {one_line(error)}")
            if for_good:
                self.set_aside[device] = f"lost {IN_A_ROW} jobs in a row, at last: {one_line(error)}"
                self._scheduler.leave(device)
            if not self._scheduler.lost(job.id):
                self.lost.append(Lost(job, tuple(self._why.pop(job.id))))
            for nobodys in self._scheduler.stranded():
                before = tuple(self._why.pop(nobodys.id, ()))
                self.lost.append(Lost(nobodys, (*before, "no device is left for it")))
            self._on_end(device, job)
            self._changed.notify_all()

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
