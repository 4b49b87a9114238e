"""An EngineSession without an engine: it takes as long as a real one and answers with the right shapes."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, replace

import numpy as np

from device_agents.errors import RunnerDied
from device_agents.simulated.recorded import Quantiles, Recorded
from kvengine.program import (
    Decode,
    Extend,
    Generate,
    Measurement,
    Observation,
    Operation,
    Prefill,
    Program,
    Reset,
    Reuse,
    Rewind,
    Sample,
    Speculate,
    Workload,
)
from kvengine.session import SessionInfo

NOTE = "simulated: latencies are drawn from recorded ones, logits are all zero"


@dataclass(frozen=True)
class Behaviour:
    """How a simulated device behaves. time_scale: how long a recorded second takes here.

    failure_rate: share of calls that end as a runner does that dies.
    """

    recorded: Recorded
    time_scale: float
    failure_rate: float


class SimulatedSession:
    """Made by SimulatedDevice.open_session. vocab: width of a row of logits. age_s: what opening it took."""

    def __init__(
        self, info: SessionInfo, behaviour: Behaviour, draws: random.Random, vocab: int, age_s: float
    ) -> None:
        self._info = replace(info, notes=(*info.notes, NOTE))
        self._behaviour, self._draws, self._vocab = behaviour, draws, vocab
        self._age_s = age_s
        self._closed = threading.Event()
        self._turn = threading.Lock()

    @property
    def info(self) -> SessionInfo:
        return self._info

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        """Raises RunnerDied: closed meanwhile, or a drawn failure."""
        with self._turn:
            self._busy("run_program", self._draw(self._behaviour.recorded.program_s))
            rows = [0] * program.batch
            return tuple(self._answer(operation, rows) for operation in program.operations)

    def run_workload(self, workload: Workload) -> Measurement:
        """Raises as ``run_program``. All it tells is unscaled: what the recorded device would have measured.

        Its device has booted when the session was opened: ``ended_s`` is all that it was busy since.
        """
        recorded = self._behaviour.recorded
        with self._turn:
            runs = [self._sample(workload) for _ in range(workload.repeats + workload.warmup)]
            began_s = self._age_s
            self._busy("run_workload", sum(run.ttft_ms + sum(run.itl_ms) for run in runs) / 1e3)
            return Measurement(
                samples=tuple(runs[workload.warmup :]),
                load_ms=self._info.load_ms,
                peak_rss_bytes=int(self._draw(recorded.peak_rss_bytes)),
                kv_bytes=recorded.kv_bytes,
                nodes_by_provider=self._info.nodes_by_provider,
                threads=self._info.session.threads or 1,
                began_s=began_s,
                ended_s=self._age_s,
            )

    def close(self) -> None:
        self._closed.set()

    def _busy(self, what: str, seconds: float) -> None:
        """As long as it is said to take; a call that is to fail does so somewhere in it."""
        fails = self._draws.random() < self._behaviour.failure_rate
        seconds *= self._draws.random() if fails else 1.0
        self._age_s += seconds
        if self._closed.wait(seconds * self._behaviour.time_scale):
            raise RunnerDied(f"{what}: this session is closed")
        if fails:
            self._closed.set()
            raise RunnerDied(f"{what}: the simulated runner died, as its failure rate has it")

    def _sample(self, workload: Workload) -> Sample:
        """A prompt's time grows with its length, as prefill's does while attention is the smaller part."""
        recorded = self._behaviour.recorded
        ttft = self._draw(recorded.ttft_ms) * len(workload.prompt) / recorded.prompt
        gaps = tuple(self._draw(recorded.itl_ms) for _ in range(workload.new_tokens - 1))
        return Sample(ttft, gaps, (0,) * workload.new_tokens)

    def _draw(self, quantiles: Quantiles) -> float:
        return quantiles.draw(self._draws)

    def _answer(self, operation: Operation, rows: list[int]) -> Observation:
        """rows: tokens in each batch row, brought up to date."""
        logits, tokens = 0, tuple[int, ...]()
        match operation:
            case Prefill(appended, _, wanted, row):
                rows[row] += len(appended)
                logits = len(appended) if wanted == "all" else 1
            case Decode(appended, row):
                rows[row] += len(appended)
                logits = len(appended)
            case Generate(_, count, row) | Speculate(_, count, _, _, row):
                rows[row] += count
                tokens = (0,) * count
            case Extend(parts):
                for row, part in enumerate(parts):
                    rows[row] += len(part)
                logits = sum(map(len, parts))
            case Reuse(kept, _, row):
                rows[row] = len(kept)
                logits = 1
            case Rewind(count, row):
                rows[row] = max(0, rows[row] - count)
            case Reset(which):
                rows[:] = [0 if which in (None, row) else tokens_in for row, tokens_in in enumerate(rows)]
            case _:
                pass  # what else there is changes no length, or one that a simulation need not know
        return Observation(tuple(rows), np.zeros((logits, self._vocab), np.float32), tokens)
