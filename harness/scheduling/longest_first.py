"""What fewest devices can do first, then the longest; of much work a mixture until its last part."""

from __future__ import annotations

import math
import zlib

from harness.scheduling.protocol import Job
from harness.scheduling.ranked import Rank, Ranked

# In longest jobs for each device: from how much work on it is mixed, and how much of it is not.
MIXED, LAST = 3.0, 1.5


class LongestFirst(Ranked):
    """Least flexible job first (Pinedo, Scheduling, 5.1), then the longest processing time.

    A device first does what it alone can do, and others do meanwhile what all can. Of jobs that any of m
    equal devices can do, the longest first ends within 4/3 - 1/(3m) of the perfect schedule (Graham, Bounds
    on multiprocessing timing anomalies, 1969), if they take as long as is expected of them.

    Longest first from the beginning would have all devices do jobs of one length, the shortest at the end:
    a thousand begin and end together, and whoever hands them out idles and chokes in turn. So as long as
    there is much to do, what is next is drawn by the job's id. The bound stays: with MIXED longest jobs of
    work for each device, any order ends within 1 + (1 - 1/m) / MIXED (Graham's list scheduling).
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
        flexible = float(len(job.devices) or math.inf)
        return flexible, float(zlib.crc32(job.id.encode())) if self._mixing else -job.seconds
