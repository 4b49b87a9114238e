"""What all schedulers have in common: they differ in the order of jobs alone."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from harness.scheduling.protocol import Job

Rank = tuple[float, ...]


@dataclass(order=True)
class _Entry:
    rank: Rank
    job: Job = field(compare=False)
    arrived: int = field(compare=False)
    tried: frozenset[str] = field(default=frozenset(), compare=False)  # devices that lost it


class Ranked(ABC):
    """See Scheduler. tries: of one job, in all. ``take`` is O(log n) of n jobs for the same devices."""

    def __init__(self, tries: int = 3) -> None:
        self._tries = tries
        self._devices: set[str] = set()
        self._waiting: dict[frozenset[str], list[_Entry]] = {}  # heaps, by the devices that will do
        self._heaps_of: dict[str, list[list[_Entry]]] = {}  # those that name the device
        self._taken: dict[str, tuple[_Entry, str]] = {}
        self._lost: dict[str, int] = {}  # how often
        self._ids: set[str] = set()
        self._arrived = 0

    @abstractmethod
    def _rank(self, job: Job, arrived: int) -> Rank:
        """The lowest is taken first. arrived: how many jobs came before."""

    @property
    def unfinished(self) -> int:
        return len(self._ids)

    def add(self, job: Job) -> None:
        if job.id in self._ids:
            raise ValueError(f"sought jobs of different ids, found {job.id!r} twice")
        self._ids.add(job.id)
        self._put(_Entry(self._full_rank(job, self._arrived), job, self._arrived))
        self._arrived += 1

    def join(self, device: str) -> None:
        self._devices.add(device)

    def leave(self, device: str) -> None:
        self._devices.discard(device)

    def take(self, device: str) -> Job | None:
        if device not in self._devices:
            return None
        heaps = [*self._heaps_of.get(device, ()), self._waiting.get(frozenset(), [])]
        found = [heap for heap in heaps if heap]
        best = min(((e, heap) for heap in found if (e := self._first(heap, device))), default=None, key=_rank)
        if best is None:
            return None
        entry, heap = best
        if heap[0] is entry:
            heapq.heappop(heap)
        else:
            heap.remove(entry)
            heapq.heapify(heap)
        self._taken[entry.job.id] = entry, device
        return entry.job

    def done(self, job_id: str) -> None:
        self._taken.pop(job_id)
        self._ids.discard(job_id)
        self._lost.pop(job_id, None)

    def lost(self, job_id: str) -> bool:
        entry, device = self._taken.pop(job_id)
        self._lost[job_id] = self._lost.get(job_id, 0) + 1
        if self._lost[job_id] >= self._tries:
            self._ids.discard(job_id)
            del self._lost[job_id]
            return False
        rank = self._full_rank(entry.job, entry.arrived)
        self._put(_Entry(rank, entry.job, entry.arrived, entry.tried | {device}))
        return True

    def stranded(self) -> tuple[Job, ...]:
        found: list[Job] = []
        for devices, heap in self._waiting.items():
            if not (devices & self._devices if devices else self._devices):
                found += [entry.job for entry in heap]
                heap.clear()
        self._ids -= {job.id for job in found}
        return tuple(found)

    def _full_rank(self, job: Job, arrived: int) -> Rank:
        """The number makes ranks differ, so that no two runs of one plan do."""
        return (*self._rank(job, arrived), float(arrived))

    def _rank_again(self) -> None:
        """For whoever has changed its mind: all that wait."""
        for heap in self._waiting.values():
            for entry in heap:
                entry.rank = self._full_rank(entry.job, entry.arrived)
            heapq.heapify(heap)

    def _put(self, entry: _Entry) -> None:
        devices = entry.job.devices
        heap = self._waiting.get(devices)
        if heap is None:
            heap = self._waiting[devices] = []
            for device in devices:
                self._heaps_of.setdefault(device, []).append(heap)
        heapq.heappush(heap, entry)

    def _first(self, heap: list[_Entry], device: str) -> _Entry | None:
        """The first that the device may have: one it lost before only where no other could have it."""
        top = heap[0]
        if self._may(top, device):
            return top
        return min((entry for entry in heap if self._may(entry, device)), default=None)

    def _may(self, entry: _Entry, device: str) -> bool:
        if device not in entry.tried:
            return True
        could = entry.job.devices & self._devices if entry.job.devices else self._devices
        return could <= entry.tried


def _rank(found: tuple[_Entry, list[_Entry]]) -> Rank:
    return found[0].rank
