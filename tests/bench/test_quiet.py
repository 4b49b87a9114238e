"""What counts as disturbed."""

from __future__ import annotations

import os

import pytest

from bench.quiet import CpuWatch, busy_seconds, elsewhere_share


def test_only_time_that_others_used_counts() -> None:
    # 2 CPUs for 10 s: we used 12 s, all together 15 s.
    assert elsewhere_share(busy=15.0, own=12.0, wall=10.0, cpus=2) == pytest.approx(0.15)


def test_coarse_ticks_never_make_the_share_leave_its_range() -> None:
    assert elsewhere_share(busy=1.98, own=2.0, wall=1.0, cpus=2) == 0.0
    assert elsewhere_share(busy=2.01, own=0.0, wall=1.0, cpus=2) == 1.0


def test_idle_and_waiting_for_disks_are_not_busy_and_stolen_time_is() -> None:
    stat = "cpu  100 20 30 4000 500 6 7 8 90 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
    assert busy_seconds(stat) == pytest.approx((100 + 20 + 30 + 6 + 7 + 8) / os.sysconf("SC_CLK_TCK"))


def test_a_watch_on_this_machine_gives_a_share() -> None:
    watch = CpuWatch()
    sum(range(100_000))
    assert 0.0 <= watch.elsewhere() <= 1.0
