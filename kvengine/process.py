"""The process that decodes: what it is started with, since later is too late, and what it got."""

from __future__ import annotations

import os

from kvengine.recipe import SessionRecipe

# glibc then asks for transparent huge pages for everything it maps (glibc manual, "Memory Allocation
# Tunables"). All weights are read once a token, so TLB misses cost several per cent of a decode step.
# Where the kernel or the libc knows nothing of it, it does nothing.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def process_environment(recipe: SessionRecipe) -> dict[str, str]:
    """Variables to start a runner with: huge pages unless the user chose tunables, then the recipe's own."""
    defaults = {name: value for name, value in HUGE_PAGES.items() if name not in os.environ}
    return {**defaults, **recipe.environment}


def process_notes() -> tuple[str, ...]:
    """What is wrong with how this process was started, for whoever reads its numbers."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    if niceness <= 0:
        return ()
    return (f"decodes at nice {niceness}: whatever else runs on this machine comes first",)
