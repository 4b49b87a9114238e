"""Of much work a mixture until its last part, which is done longest first."""

from __future__ import annotations

import zlib

from harness.scheduling.longest_first import LongestFirst
from harness.scheduling.protocol import Job
from harness.scheduling.ranked import Rank

# In longest jobs for each device: from how much work on it is mixed, and how much of it is not.
MIXED, LAST = 3.0, 1.5


class MixedFirst(LongestFirst):
    """For many devices: longest first from the beginning would have all of them do jobs of one length.

    A thousand then begin and end together, with the shortest jobs at the end, and whoever hands them out
    idles and chokes in turn. So as long as there is much to do, what is next is drawn by the job's id.
    The bound of LongestFirst stays: with MIXED longest jobs of work for each device, any order ends within
    1 + (1 - 1/m) / MIXED of the perfect schedule (Graham's list scheduling).
    """

    def __init__(self, tries: int = 3) -> None:
        super().__init__(tries)
        self._all_s = self._waiting_s = self._longest_s = 0.0
        self._mixing = True

    def add(self, job: Job) -> None:
        super().add(job)
        self._all_s += job.seconds
        self._waiting_s += job.seconds
        self._longest_s = max(self._longest_s, job.seconds)

    def take(self, device: str) -> Job | None:
        if self._mixing and not self._is_much():
            self._mixing = False
            self._rank_again()
        job = super().take(device)
        self._waiting_s -= 0.0 if job is None else job.seconds
        return job

    def lost(self, job_id: str) -> bool:
        seconds = self._taken[job_id][0].job.seconds
        again = super().lost(job_id)
        self._waiting_s += seconds if again else 0.0
        return again

    def _is_much(self) -> bool:
        unit = len(self._devices) * self._longest_s
        return self._all_s >= MIXED * unit and self._waiting_s > LAST * unit

    def _rank(self, job: Job, arrived: int) -> Rank:
        flexible, longest = super()._rank(job, arrived)
        return flexible, float(zlib.crc32(job.id.encode())) if self._mixing else longest
