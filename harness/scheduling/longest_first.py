"""What fewest devices can do first, then the longest."""

from __future__ import annotations

import math

from harness.scheduling.protocol import Job
from harness.scheduling.ranked import Rank, Ranked


class LongestFirst(Ranked):
    """Least flexible job first (Pinedo, Scheduling, 5.1), then the longest processing time.

    A device first does what it alone can do, and others do meanwhile what all can. Of jobs that any of m
    equal devices can do, the longest first ends within 4/3 - 1/(3m) of the perfect schedule (Graham, Bounds
    on multiprocessing timing anomalies, 1969), if they take as long as is expected of them.
    """

    def _rank(self, job: Job, arrived: int) -> Rank:
        return float(len(job.devices) or math.inf), -job.seconds
