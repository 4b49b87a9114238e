"""First come, first served: what the others are compared with."""

from __future__ import annotations

from harness.scheduling.protocol import Job
from harness.scheduling.ranked import Rank, Ranked


class InOrder(Ranked):
    """Graham's list scheduling: within 2 - 1/m of the perfect schedule of jobs for m equal devices."""

    def _rank(self, job: Job, arrived: int) -> Rank:
        return (float(arrived),)
