"""Checks share a machine, a measurement has it alone, and nobody waits for the dead or for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from device_agents.errors import DeadlineExceeded
from harness import quiet
from harness.quiet import Quiet

HOLDER = """
import sys, time
from pathlib import Path
from harness.quiet import Quiet
with Quiet(Path(sys.argv[1])).alone():
    print("has it", flush=True)
    time.sleep(60)
"""


def begin(pool: ThreadPoolExecutor, how: Callable[[], AbstractContextManager[None]]) -> Future[None]:
    """Takes and gives back, in a thread: as another process would."""

    def hold() -> None:
        with how():
            pass

    return pool.submit(hold)


def waits(future: Future[None]) -> bool:
    with pytest.raises(TimeoutError):
        future.result(0.3)
    return True


def test_checks_share_and_a_leg_waits_for_them(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        with Quiet(tmp_path).shared(), Quiet(tmp_path).shared():
            leg = begin(pool, Quiet(tmp_path).alone)
            assert waits(leg)
        leg.result(10)


def test_a_check_and_another_leg_wait_for_a_leg(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        with Quiet(tmp_path).alone():
            others = [begin(pool, Quiet(tmp_path).shared), begin(pool, Quiet(tmp_path).alone)]
            assert all(map(waits, others))
        for other in others:
            other.result(10)


def test_a_waiting_leg_is_not_overtaken_by_checks_that_come_later(tmp_path: Path) -> None:
    order: list[str] = []
    asked = threading.Event()
    with ThreadPoolExecutor() as pool:
        with Quiet(tmp_path).shared():
            leg = Quiet(tmp_path, asked.set)

            def measure() -> None:
                with leg.alone():
                    order.append("leg")

            def check() -> None:
                with Quiet(tmp_path).shared():
                    order.append("check")

            first = pool.submit(measure)
            assert asked.wait(10), "the leg was never told that it waits"
            second = pool.submit(check)
            assert waits(second)
        first.result(10)
        second.result(10)
    assert order == ["leg", "check"]
    assert leg.waited_s > 0.2


def test_the_dead_hold_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with ThreadPoolExecutor() as pool:
        check = begin(pool, Quiet(tmp_path).shared)
        assert waits(check)
        holder.kill()
        holder.wait()
        holder.stdout.close()
        check.result(10)


def test_waiting_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "WAIT_S", 0.1)
    with (
        Quiet(tmp_path).shared(),
        pytest.raises(DeadlineExceeded, match=r"machine\.lock"),
        Quiet(tmp_path).alone(),
    ):
        pass
    with Quiet(tmp_path).alone():
        pass  # who gave up holds nothing


def test_a_check_that_measures_gives_its_share_up_for_as_long(tmp_path: Path) -> None:
    mine = Quiet(tmp_path)
    with ThreadPoolExecutor() as pool:
        with mine.shared():
            with mine.alone():
                other = begin(pool, Quiet(tmp_path).shared)
                assert waits(other)
            other.result(10)
            leg = begin(pool, Quiet(tmp_path).alone)
            assert waits(leg)
        leg.result(10)
