"""One process per engine, all alive, one measuring at a time and the others asleep."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import kvengine  # noqa: F401  (first: it sets ORT_DISABLE_TELEMETRY for every import of onnxruntime below)
from bench.errors import BenchError
from bench.quiet import CpuWatch

Float32 = npt.NDArray[np.float32]

LOAD_SECONDS = 300.0
END_SECONDS = 5.0
ANSWER_SECONDS = 300.0  # a round takes 3 s on an idle machine and has been seen to take 40 on a busy one


@dataclass(frozen=True)
class Run:
    """One prompt and its greedy tokens. itl_ms: one gap for every token but the first."""

    ttft_ms: float
    itl_ms: tuple[float, ...]
    tokens: tuple[int, ...]
    elsewhere: float  # share of the machine's CPU time that others used meanwhile

    @property
    def tokens_per_second(self) -> float:
        """Decode only: tokens after the first over the time they took."""
        return 1e3 * len(self.itl_ms) / sum(self.itl_ms)


class Engine(Protocol):
    """What a contestant's process holds."""

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
        """Time stamps (seconds): before the prompt, then after each token; and the tokens."""

    def logits(self, prompt: list[int]) -> Float32:
        """[vocab] after the last token of ``prompt``."""


class OurEngine:
    """kvengine through its public session, as the runner on a device uses it."""

    def __init__(self, folder: str, threads: int) -> None:
        from kvengine.engine import LocalEngine
        from kvengine.recipe import SessionRecipe

        # verify=False: the other side checks no sha256 either.
        self._engine = LocalEngine.open(folder, SessionRecipe(threads=threads), verify=False)

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
        from kvengine.program import Workload

        workload = Workload(tuple(prompt), new_tokens, repeats=1, warmup=0)
        sample = self._engine.run_workload(workload).samples[0]
        return list(np.cumsum([0.0, sample.ttft_ms, *sample.itl_ms]) / 1e3), list(sample.tokens)

    def logits(self, prompt: list[int]) -> Float32:
        from kvengine.program import Prefill, Program

        program = Program(len(prompt), (Prefill(tuple(prompt), logits="last"),))
        last: Float32 = self._engine.run_program(program)[0].logits[0]
        return last


class GenaiEngine:
    """onnxruntime-genai with its own defaults, but for the number of threads."""

    def __init__(self, folder: str, threads: int, packages: str, window: int) -> None:
        sys.path.insert(0, packages)
        import onnxruntime_genai

        self._api: Any = onnxruntime_genai
        self._window = window
        config = self._api.Config(folder)
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = self._api.Model(config)

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
        generator = self._generator(len(prompt) + new_tokens)
        ids = np.array(prompt, np.int32)
        stamps = [time.perf_counter()]
        tokens: list[int] = []
        generator.append_tokens(ids)
        for _ in range(new_tokens):
            if generator.is_done():
                raise BenchError(f"genai met its end token after {len(tokens)} tokens; use another prompt")
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            stamps.append(time.perf_counter())
        return stamps, tokens

    def logits(self, prompt: list[int]) -> Float32:
        generator = self._generator(len(prompt) + 1)
        generator.append_tokens(np.array(prompt, np.int32))
        found: Float32 = np.asarray(generator.get_logits(), np.float32)
        last: Float32 = found.reshape(-1, found.shape[-1])[-1]
        return last

    def _generator(self, length: int) -> Any:
        params = self._api.GeneratorParams(self._model)
        # genai 0.18 sizes its windowed caches by max_length and fails where that is below the window.
        params.set_search_options(max_length=max(length, self._window), do_sample=False)
        return self._api.Generator(self._model, params)


class TorchReference:
    """The oracle: transformers in float32. It only says what the logits should have been."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        from harness.reference import TransformersReference

        self._model = TransformersReference(checkpoint, threads=threads)

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
        raise NotImplementedError("the oracle is not timed")

    def logits(self, prompt: list[int]) -> Float32:
        last: Float32 = self._model.logits(tuple(prompt))[-1]
        return last


class Contestant:
    """An Engine in a process of its own. A context manager: the process ends with the block.

    make: called there with ``arguments``. environment: set in that process from its very start.

    Raises (all methods):
        BenchError: the process died, raised or did not answer in time.
    """

    def __init__(
        self,
        name: str,
        make: Callable[..., Engine],
        arguments: tuple[object, ...] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        with _environment(environment):
            self._process.start()
        there.close()
        try:
            self.load_ms: float = self._receive(LOAD_SECONDS)
        except BenchError:
            self.close()
            raise

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process: it is asked by closing its pipe, and killed if it does not listen."""
        self._pipe.close()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(END_SECONDS)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        found: Run = self._ask("run", prompt, new_tokens)
        return found

    def logits(self, prompt: list[int]) -> Float32:
        found: Float32 = self._ask("logits", prompt)
        return found

    def peak_rss_bytes(self) -> int:
        found: int = self._ask("peak_rss")
        return found

    def _ask(self, *request: object) -> Any:
        try:
            self._pipe.send(request)
        except OSError as error:
            raise BenchError(f"{self.name}: its process is gone ({error})") from error
        return self._receive(ANSWER_SECONDS)

    def _receive(self, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                raise BenchError(f"{self.name}: no answer within {seconds:g} s")
            failed, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(END_SECONDS)
            raise BenchError(f"{self.name}: its process ended with {self._process.exitcode}") from error
        if failed:
            raise BenchError(f"{self.name} failed:\n{answer}")
        return answer


@contextmanager
def _environment(extra: Mapping[str, str]) -> Iterator[None]:
    """os.environ with ``extra``, for a process that is started within."""
    before = dict(os.environ)
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, make: Callable[..., Engine], arguments: tuple[object, ...]) -> None:
    """The contestant's process: build the engine, then answer until the pipe closes."""
    try:
        started = time.perf_counter()
        engine = make(*arguments)
        pipe.send((False, (time.perf_counter() - started) * 1e3))
        while True:
            name, *request = pipe.recv()
            pipe.send((False, _ANSWERS[name](engine, *request)))
    except EOFError:
        return
    except Exception:
        pipe.send((True, traceback.format_exc()))


def _run(engine: Engine, prompt: list[int], new_tokens: int) -> Run:
    watch = CpuWatch()
    stamps, tokens = engine.generate(prompt, new_tokens)
    elsewhere = watch.elsewhere()
    gaps = [float(gap) for gap in np.diff(stamps) * 1e3]
    return Run(gaps[0], tuple(gaps[1:]), tuple(tokens), elsewhere)


def _peak_rss(_: Engine) -> int:
    from kvengine.engine import peak_rss_bytes

    return peak_rss_bytes()


_ANSWERS: dict[str, Callable[..., Any]] = {
    "run": _run,
    "logits": lambda engine, prompt: engine.logits(prompt),
    "peak_rss": _peak_rss,
}
