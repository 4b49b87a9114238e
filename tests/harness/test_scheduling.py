"""Which job a device gets: each once, the longest first, and after a failure on another device."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agents.deadline import Deadline
from device_agents.errors import RunnerDied
from harness.handover import Planned
from harness.scheduling import InOrder, Job, LongestFirst, MixedFirst, Scheduler
from harness.scheduling.bounds import perfect_s
from harness.scheduling.dispatch import Dispatcher, Done
from harness.scheduling.history import History
from harness.store.protocol import Durations

EVERY: list[Callable[[], Scheduler]] = [LongestFirst, MixedFirst, InOrder]
DEVICES = ("a", "b", "c")


def scheduler_of(make: Callable[[], Scheduler], jobs: Sequence[Job], devices: Sequence[str]) -> Scheduler:
    scheduler = make()
    for job in jobs:
        scheduler.add(job)
    for device in devices:
        scheduler.join(device)
    return scheduler


def makespan(scheduler: Scheduler, devices: Sequence[str]) -> float:
    """When the last job ends if each takes as long as expected; a device that is free takes at once."""
    running = [(0.0, device, "") for device in devices]
    end = 0.0
    while running:
        now, device, job_id = heapq.heappop(running)
        if job_id:
            scheduler.done(job_id)
            end = now
        if (job := scheduler.take(device)) is not None:
            heapq.heappush(running, (now + job.seconds, device, job.id))
    return end


def jobs_of(seconds: Sequence[float]) -> list[Job]:
    return [Job(f"job {number}", each) for number, each in enumerate(seconds)]


LENGTHS = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=6)


@pytest.mark.parametrize("make", [LongestFirst, MixedFirst])
@given(lengths=LENGTHS, count=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_longest_first_keeps_grahams_bound(
    make: Callable[[], Scheduler], lengths: list[float], count: int
) -> None:
    best = min(
        max(sum(s for s, on in zip(lengths, placed, strict=True) if on == d) for d in range(count))
        for placed in itertools.product(range(count), repeat=len(lengths))
    )
    devices = DEVICES[:count]
    found = makespan(scheduler_of(make, jobs_of(lengths), devices), devices)
    assert perfect_s(lengths, count) <= best <= found <= (4 / 3 - 1 / (3 * count)) * best + 1e-9


def test_a_long_job_that_comes_last_is_begun_first() -> None:
    lengths = [1.0] * 8 + [4.0]
    both = DEVICES[:2]
    assert makespan(scheduler_of(LongestFirst, jobs_of(lengths), both), both) == 6.0
    assert makespan(scheduler_of(InOrder, jobs_of(lengths), both), both) == 8.0


@pytest.mark.parametrize("make", EVERY)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_each_job_ends_once_on_a_device_that_fits(make: Callable[[], Scheduler], data: st.DataObject) -> None:
    """Whatever is lost, and whichever devices come and go."""
    choices = st.frozensets(st.sampled_from(DEVICES))
    wanted = data.draw(st.lists(choices, min_size=1, max_size=8))
    jobs = [Job(f"job {n}", float(n % 3), devices) for n, devices in enumerate(wanted)]
    scheduler = scheduler_of(make, jobs, ())
    there: set[str] = set()
    taken: dict[str, Job] = {}
    ended: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for device, event in data.draw(
        st.lists(st.tuples(st.sampled_from(DEVICES), st.sampled_from(("join", "leave", "done", "lost"))))
    ):
        if event == "join":
            scheduler.join(device)
            there.add(device)
        elif event == "leave":
            scheduler.leave(device)
            there.discard(device)
        elif device in taken:
            job = taken.pop(device)
            if event == "done":
                scheduler.done(job.id)
                ended[job.id] += 1
            else:
                lost[job.id] += 1
                again = scheduler.lost(job.id)
                assert again == (lost[job.id] < 3)
                ended[job.id] += not again
        if device not in taken and (found := scheduler.take(device)) is not None:
            assert device in there
            assert found.fits(device)
            taken[device] = found
    for device, job in taken.items():
        scheduler.done(job.id)
        ended[job.id] += 1
        scheduler.leave(device)
    for device in DEVICES[:2]:
        scheduler.join(device)
    for device in DEVICES[2:]:
        scheduler.leave(device)
    ended.update(job.id for job in scheduler.stranded())
    while left := [found for device in DEVICES[:2] if (found := scheduler.take(device)) is not None]:
        for job in left:
            scheduler.done(job.id)
            ended[job.id] += 1
    assert ended == Counter({job.id: 1 for job in jobs})
    assert scheduler.unfinished == 0


def test_much_work_is_mixed_until_its_last_part() -> None:
    """Else all devices would do long jobs first and a multitude of short ones at the end."""
    lengths = [1.0, 2.0, 3.0, 4.0] * 25  # 250 s: on two devices 125 s each, of which 6 s are not mixed
    scheduler = scheduler_of(MixedFirst, jobs_of(lengths), DEVICES[:2])
    taken = [job.seconds for _ in lengths if (job := scheduler.take("a"))]
    assert len(taken) == len(lengths)
    first, last = taken[:40], taken[-4:]
    assert sum(first) / len(first) == pytest.approx(2.5, abs=0.4)
    assert last == sorted(last, reverse=True)
    found = makespan(scheduler_of(MixedFirst, jobs_of(lengths), DEVICES[:2]), DEVICES[:2])
    assert found <= perfect_s(lengths, 2) + 1.0


def test_a_device_first_does_what_it_alone_can_do() -> None:
    everybody, alone = Job("everybody's", 9.0), Job("a's alone", 1.0, frozenset("a"))
    scheduler = scheduler_of(LongestFirst, (everybody, alone), "ab")
    assert scheduler.take("a") == alone
    assert scheduler.take("b") == everybody


@pytest.mark.parametrize("make", EVERY)
def test_what_was_lost_goes_to_another_device(make: Callable[[], Scheduler]) -> None:
    job = Job("job", 1.0, frozenset("ab"))
    scheduler = scheduler_of(make, (job,), "abc")
    assert scheduler.take("a") == job
    assert scheduler.lost(job.id)
    assert scheduler.take("a") is None, "b has not yet tried"
    assert scheduler.take("c") is None, "it does not fit"
    assert scheduler.take("b") == job


@pytest.mark.parametrize("make", EVERY)
def test_what_no_other_device_can_do_goes_to_the_same(make: Callable[[], Scheduler]) -> None:
    job = Job("job", 1.0, frozenset("ab"))
    scheduler = scheduler_of(make, (job,), "ab")
    scheduler.take("a")
    scheduler.leave("b")
    assert scheduler.lost(job.id)
    assert scheduler.take("a") == job


def test_ids_are_different() -> None:
    with pytest.raises(ValueError, match="'job 0' twice"):
        scheduler_of(LongestFirst, jobs_of([1.0]) * 2, ())


# -- doing them ---------------------------------------------------------------------------------------


class Fake:
    """Devices that fail as they are told; what was kept, and what was begun before it was."""

    def __init__(self, failures: dict[str, int] | None = None) -> None:
        self.failures = failures or {}
        self.kept: list[Done[str]] = []
        self.unkept: dict[str, str] = {}  # device to a job that was done and not yet kept
        self.early: list[str] = []
        self._lock = threading.Lock()

    def work(self, device: str, job: Job) -> str:
        with self._lock:
            if device in self.unkept:
                self.early.append(job.id)
            if self.failures.get(device, 0):
                self.failures[device] -= 1
                raise RunnerDied(f"{device} fell over")
            self.unkept[device] = job.id
            return f"{job.id} on {device}"

    def keep(self, done: Done[str]) -> None:
        with self._lock:
            assert self.unkept.pop(done.device) == done.job.id
            self.kept.append(done)

    def run(self, jobs: Sequence[Job], devices: Sequence[str] = DEVICES) -> Dispatcher[str]:
        dispatcher = Dispatcher(scheduler_of(LongestFirst, jobs, ()), devices, self.work, self.keep)
        dispatcher.run(Deadline(30))
        return dispatcher


def test_every_result_is_kept_before_the_device_goes_on() -> None:
    fake = Fake()
    fake.run(jobs_of([1.0] * 50))
    assert Counter(done.job.id for done in fake.kept) == Counter(f"job {n}" for n in range(50))
    assert not fake.early


def test_a_failure_is_tried_on_another_device_and_seen() -> None:
    fake = Fake({"a": 1})
    dispatcher = fake.run([Job("only", 1.0, frozenset("ab"))], ("a", "b"))
    (done,) = fake.kept
    if done.device == "b" and done.retries:
        assert done.retries == ("on a: RunnerDied: a fell over",)
    assert not dispatcher.lost


def test_a_device_that_loses_two_in_a_row_is_set_aside() -> None:
    fake = Fake({"a": 99})
    jobs = [Job(f"job {n}", 1.0, frozenset("ab")) for n in range(6)]
    jobs.append(Job("a's alone", 9.0, frozenset("a")))
    dispatcher = fake.run(jobs, ("a", "b"))
    assert set(dispatcher.set_aside) == {"a"}
    assert "a fell over" in dispatcher.set_aside["a"]
    (lost,) = dispatcher.lost
    assert lost.job.id == "a's alone"
    assert lost.why[-1] == "no device is left for it"
    assert {done.device for done in fake.kept} == {"b"}
    assert len(fake.kept) == 6


def test_what_cannot_be_kept_ends_the_run() -> None:
    def refuse(done: Done[str]) -> None:
        raise OSError("disk full")

    fake = Fake()
    dispatcher = Dispatcher(scheduler_of(LongestFirst, jobs_of([1.0] * 9), ()), "a", fake.work, refuse)
    with pytest.raises(OSError, match="disk full"):
        dispatcher.run(Deadline(30))
    assert len(fake.unkept) == 1, "nothing was begun after it"


# -- how long they take -------------------------------------------------------------------------------


def test_history_knows_the_device_then_the_test_then_the_usual() -> None:
    history = History(
        Durations(
            checks=(("a", "r", "test_one", 2.0), ("a", "r", "test_one", 4.0), ("b", "r", "test_one", 9.0)),
            legs=(("a", 5.0),),
        )
    )

    def planned(device: str, recipe: str, name: str) -> Planned:
        return Planned("id", name, "title", "label", "check", device, recipe)

    assert history.seconds(planned("a", "r", "test_one")) == 3.0
    assert history.seconds(planned("new phone", "r", "test_one")) == 4.0
    assert history.seconds(planned("new phone", "new recipe", "test_one")) == 4.0
    assert history.seconds(planned("a", "r", "test_new")) == 4.0, "the median of what is known"
    both = Planned("id", "test_one", "title", "label", "both", "a", "r")
    assert history.seconds(both) == 3.0 + 5.0
    assert History(Durations()).seconds(planned("a", "b", "c")) == 1.0
