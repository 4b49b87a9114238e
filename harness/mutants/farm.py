"""All mutants at once, in a few processes; and the right engine, which must pass what finds them."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device_agents.errors import DeadlineExceeded
from harness.mutants.catalogue import MUTANTS
from harness.mutants.mutant import RIGHT, Mutant
from harness.mutants.running import Judged, Workshop, judge

TASK_SECONDS = 600.0
Progress = Callable[[Judged, int, int], None]
"""Called with what was judged last, how much is done, and how much there is."""

# Where the right engine is run: every kind of cache, every dtype, every model.
RIGHT_CELLS = (
    ("hybrid,slack=2", "w2"),
    ("static", "w3"),
    ("naive", "w4"),
    ("hybrid-int8kv,slack=2", "w5"),
    ("hybrid", "scaled"),
    ("hybrid-int4kv", "w3"),
    ("hybrid-fp16kv,slack=2", "w4"),
    ("static,cache-dtype=int8", "w2"),
    ("hybrid,slack=2", "local"),
    ("naive,cache-dtype=int4", "w5"),
)


@dataclass(frozen=True)
class _Task:
    """One mutant, or the right engine in one of its cells, with one seed."""

    mutant: str
    examples: int
    seed: int
    cell: int = 0
    first: bool = False


class Crew:
    """Processes that each hold their own references and judge one mutant at a time."""

    def __init__(self, workers: int, root: Path) -> None:
        # Not forked: torch and onnxruntime have threads of their own.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, _begin, (root,))
        self._workers = workers

    def judge(
        self, mutants: Sequence[Mutant], examples: int, seed: int, first: bool, progress: Progress
    ) -> list[Judged]:
        """Every mutant against every property, or until the ``first`` that finds it; in the order given.

        Raises:
            DeadlineExceeded: one takes longer than TASK_SECONDS.
        """
        tasks = [_Task(mutant.name, examples, seed, first=first) for mutant in mutants]
        found: dict[str, Judged] = {}
        for judged in self._run(iter(tasks)):
            found[judged.mutant] = judged
            progress(judged, len(found), len(tasks))
        return [found[mutant.name] for mutant in mutants]

    def right(self, programs: int, examples: int, seed: int, progress: Progress) -> list[Judged]:
        """The engine as it is, in cell after cell with seed after seed, until ``programs`` have been run."""
        found: list[Judged] = []
        done = 0

        def more() -> Iterator[_Task]:
            for number in itertools.count():
                if done >= programs:
                    return
                yield _Task("", examples, seed + number, number % len(RIGHT_CELLS))

        for judged in self._run(more()):
            found.append(judged)
            done += judged.programs
            progress(judged, min(done, programs), programs)
        return found

    def close(self) -> None:
        for process in self._pool._processes.values():
            process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, tasks: Iterator[_Task]) -> Iterator[Judged]:
        """Results as they come; a task is given out only when a process is free for it."""
        waiting: set[Future[Judged]] = set()
        last = time.monotonic()
        while True:
            while len(waiting) < self._workers and (task := next(tasks, None)) is not None:
                waiting.add(self._pool.submit(_work, task))
            if not waiting:
                return
            done, waiting = wait(waiting, TASK_SECONDS, FIRST_COMPLETED)
            if not done:
                raise DeadlineExceeded(f"no mutant was judged within {time.monotonic() - last:.0f} s")
            last = time.monotonic()
            for future in done:
                yield future.result()


@contextmanager
def crew(workers: int) -> Iterator[Crew]:
    """Started, and stopped whatever happens."""
    with tempfile.TemporaryDirectory(prefix="kvfarm-mutants-") as root:
        crew = Crew(workers, Path(root))
        try:
            yield crew
        finally:
            crew.close()


_workshop: Workshop | None = None
_BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


def _begin(root: Path) -> None:
    global _workshop
    _workshop = Workshop(root)


def _work(task: _Task) -> Judged:
    assert _workshop is not None, "_begin comes first"
    if task.mutant:
        mutant = _BY_NAME[task.mutant]
    else:
        recipe, model = RIGHT_CELLS[task.cell]
        mutant = Mutant(RIGHT, 0, "", "", (), recipe, model)
    return judge(_workshop, mutant, task.examples, task.seed, first=task.first)
