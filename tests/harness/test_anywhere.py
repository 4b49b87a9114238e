"""A test for any device of a kind: on a free one, and after a failure of infrastructure on another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from device_agents.errors import LeaseNotGranted, RunnerDied
from device_agents.lab_types import Lease
from harness.anywhere import AnyOf, run_anywhere
from harness.errors import Quarantined, ReferenceFailed
from harness.recovery import Recovery, RecoveryPolicy

PLACE = AnyOf(("a", "b", "c"))


@dataclass
class Farm:
    """taken: devices that others have."""

    taken: set[str] = field(default_factory=set)
    held: list[str] = field(default_factory=list)

    def holding(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name in self.held)

    def hold(self, count: int, names: Sequence[str], wait_s: float | None = None) -> tuple[Lease, ...]:
        free = [name for name in names if name not in self.taken and name not in self.held]
        if not free:
            raise LeaseNotGranted("others have them")
        self.held.append(free[0])
        return (Lease(free[0], "me", 1),)


@dataclass
class Run:
    """fails: devices that fail each time. tried: where, in order."""

    farm: Farm = field(default_factory=Farm)
    fails: tuple[str, ...] = ()
    tried: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    retries: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        policy = RecoveryPolicy(retries=2, answer_s=0, lost_in_a_row=2)
        self.recovery = Recovery(
            lambda device: None, policy, on_retry=lambda device, why: self.told.append(why)
        )
        self.options = SimpleNamespace(recovery=policy)

    def give_back(self, device: str) -> None:
        self.farm.held.remove(device)

    def work(self, device: str) -> str:
        if device in self.fails:
            raise RunnerDied(f"{device} fell over")
        return f"done on {device}"

    def __call__(self, place: AnyOf = PLACE, work: Any = None) -> str:
        run: Any = self
        found: str = run_anywhere(run, place, work or self.work, self.retries, self.tried.append)
        return found


def test_it_runs_on_the_device_that_we_have() -> None:
    run = Run(Farm(held=["b"]))
    assert run() == "done on b"


def test_without_one_it_takes_the_first_that_is_free() -> None:
    run = Run(Farm(taken={"a"}))
    assert run() == "done on b"
    assert run.farm.held == ["b"]


def test_after_a_failure_it_goes_on_on_another_one_and_says_so() -> None:
    run = Run(fails=("a",))
    assert run() == "done on b"
    assert run.tried == ["a", "b"]
    assert run.retries == run.told == ["on a: RunnerDied: a fell over; tried again on b"]
    assert run.farm.held == ["b"], "the other one is given back"


def test_where_no_other_is_free_it_stays() -> None:
    run = Run(Farm(taken={"b", "c"}), fails=("a",))
    with pytest.raises(RunnerDied, match="a fell over"):
        run()
    assert set(run.tried) == {"a"}
    assert "no other device of its kind was free" in run.retries[0]


def test_tries_have_an_end() -> None:
    run = Run(fails=PLACE.devices)
    with pytest.raises(RunnerDied):
        run()
    assert len(run.tried) == 3
    assert len(run.retries) == 2


def test_what_the_engine_answers_is_not_tried_again() -> None:
    run = Run()

    def wrong(device: str) -> str:
        raise AssertionError("wrong logits")

    with pytest.raises(AssertionError):
        run(work=wrong)
    assert run.tried == ["a"]


def test_what_the_reference_lacks_is_no_devices_fault() -> None:
    run = Run()

    def unknown(device: str) -> str:
        raise ReferenceFailed("it died")

    with pytest.raises(ReferenceFailed):
        run(work=unknown)
    assert run.tried == ["a"]


def test_those_in_quarantine_are_passed_over() -> None:
    run = Run()
    run.recovery.recall("a", "swollen")
    assert run() == "done on b"
    for device in "bc":
        run.recovery.recall(device, "hot")
    with pytest.raises(Quarantined, match="a: swollen; b: hot; c: hot"):
        run()
