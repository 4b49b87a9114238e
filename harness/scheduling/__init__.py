"""Which job a device does next. protocol: the seam; longest_first, mixed_first, in_order: what does it.

dispatch: does the jobs. history: how long they took before. bounds: how good any schedule can be.
"""

from harness.scheduling.in_order import InOrder
from harness.scheduling.longest_first import LongestFirst
from harness.scheduling.mixed_first import MixedFirst
from harness.scheduling.protocol import Job, Scheduler

__all__ = ["InOrder", "Job", "LongestFirst", "MixedFirst", "Scheduler"]
