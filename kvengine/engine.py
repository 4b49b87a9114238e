"""An EngineSession in this process: interprets programs and measures workloads."""

from __future__ import annotations

import dataclasses
import platform
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from kvengine.artifact import Artifact
from kvengine.bandwidth import measure_bandwidth
from kvengine.decoder import Decoder
from kvengine.errors import InvalidRequest
from kvengine.foreign import ForeignDecoder
from kvengine.interpreter import Interpreter
from kvengine.model import Model
from kvengine.process import process_notes
from kvengine.program import Measurement, Observation, Program, Sample, Workload
from kvengine.recipe import SessionRecipe
from kvengine.session import SessionInfo
from kvengine.unbound import decoder_for

# A context comes in pieces: with full logits, 4,096 tokens in one shot would take 4 GB for their rows.
CONTEXT_CHUNK = 256

MOST_SLOWDOWN = 10.0  # an injection is a test of the gate, not a way to hang a device


class LocalEngine:
    """The engine behind every check: in a test it runs here, on a device inside the runner."""

    decoder_type: type[Decoder] | None = None  # where tests inject a broken one

    def __init__(self, model: Model) -> None:
        self.model = model
        self._nodes = model.nodes_by_provider()
        if model.artifact.manifest.contract is not None:
            self.decoder_type = ForeignDecoder

    @classmethod
    def open(cls, folder: str | Path, recipe: SessionRecipe, *, verify: bool = True) -> LocalEngine:
        """Load the artifact in ``folder``.

        Raises:
            ArtifactError, RecipeError, ProviderUnavailable, EngineFailure.
        """
        return cls(Model(Artifact.open(folder, verify=verify), recipe))

    @property
    def info(self) -> SessionInfo:
        return SessionInfo(
            artifact_id=self.model.artifact.id,
            session=dataclasses.replace(self.model.recipe, threads=self.model.threads),
            load_ms=self.model.load_ms,
            onnxruntime=ort.__version__,
            numpy=np.__version__,
            python=platform.python_version(),
            nodes_by_provider=self._nodes,
            notes=(*self.model.notes, *process_notes()),
        )

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        """Run every operation on a fresh Decoder; an operation the engine refuses does not end the program.

        Raises:
            InvalidRequest: the program's capacity, batch or slack cannot be had.
        """
        decoder = self._make_decoder(program.capacity, program.batch, program.slack)
        with Interpreter(decoder) as interpreter:
            return tuple(interpreter.observe(operation) for operation in program.operations)

    def run_workload(self, workload: Workload) -> Measurement:
        """Time ``workload.repeats`` generations after ``workload.warmup`` unrecorded ones.

        Raises:
            KvEngineError: the workload does not fit the model.
        """
        if workload.new_tokens < 1 or workload.repeats < 1 or workload.warmup < 0:
            raise InvalidRequest("sought new_tokens >= 1, repeats >= 1 and warmup >= 0")
        if not 0 <= workload.slowdown <= MOST_SLOWDOWN or workload.ballast_bytes < 0:
            raise InvalidRequest(f"sought a slowdown of 0 to {MOST_SLOWDOWN} and ballast_bytes >= 0")
        ballast = np.ones(workload.ballast_bytes, np.uint8)  # written, so that it is resident
        capacity = workload.capacity or len(workload.context) + len(workload.prompt) + workload.new_tokens
        decoder = self._make_decoder(capacity)
        samples = []
        began_s = _since_boot()
        for repeat in range(workload.warmup + workload.repeats):
            decoder.reset()
            if workload.context:
                decoder.prefill(workload.context, chunk=CONTEXT_CHUNK)
            sample = _generate(decoder, workload)
            if repeat >= workload.warmup:
                samples.append(sample)
        del ballast
        measured = Measurement(
            samples=tuple(samples),
            load_ms=self.model.load_ms,
            peak_rss_bytes=peak_rss_bytes(),
            kv_bytes=decoder.kv_bytes,
            nodes_by_provider=self._nodes,
            threads=self.model.threads,
            began_s=began_s,
            ended_s=_since_boot(),
        )
        if not workload.bandwidth:
            return measured
        return dataclasses.replace(measured, bandwidth=measure_bandwidth())  # not while anything is timed

    def close(self) -> None:
        """Free the session; further calls fail."""
        del self.model

    def _make_decoder(self, capacity: int, batch: int = 1, slack: int | None = None) -> Decoder:
        decoder_type = self.decoder_type or decoder_for(self.model.recipe)
        return decoder_type(self.model, capacity, batch=batch, slack=slack)


def _generate(decoder: Decoder, workload: Workload) -> Sample:
    clock = time.perf_counter
    started = clock()
    tokens = [int(decoder.start(workload.prompt, chunk=workload.chunk)[0])]
    stamps = [_slowed(started, clock(), workload.slowdown)]
    for _ in range(workload.new_tokens - 1):
        tokens.append(int(decoder.step()[0]))
        stamps.append(_slowed(stamps[-1], clock(), workload.slowdown))
    gaps = np.diff(stamps) * 1e3
    return Sample((stamps[0] - started) * 1e3, tuple(map(float, gaps)), tuple(tokens))


def _slowed(began: float, ended: float, slowdown: float) -> float:
    """The time now (s), after spinning for a share of the step that took from ``began`` to ``ended``."""
    if not slowdown:
        return ended
    until = ended + slowdown * (ended - began)
    while (now := time.perf_counter()) < until:
        pass
    return now


def _since_boot() -> float:
    """s, on the clock of /proc/uptime; 0 where there is none."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if boottime is None else time.clock_gettime(boottime)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, in bytes: VmHWM of /proc/self/status.

    Not getrusage's ru_maxrss, which a child inherits from the process that forked it.
    """
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
