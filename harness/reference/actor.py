"""The reference in a Ray actor: torch stays out of the test process, and all devices share one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from device_agents.errors import DeadlineExceeded, InfrastructureError
from harness.cluster import NAMESPACE
from harness.errors import HarnessError
from harness.reference.cached import CachedReference
from harness.reference.protocol import Float32Array, Hidden, KeysAndValues
from harness.reference.transformers_reference import TransformersReference
from kvengine.errors import KvEngineError

LOAD_SECONDS = 300.0  # importing torch takes 10 s on a cold disk, reading 4 GB of weights a minute
CALL_SECONDS = 300.0  # a forward pass of 1,000 tokens through 1 G weights on one slow core


class _ReferenceActor:
    """Lives in the actor's process. Loads in ``load`` and not in __init__, so that errors keep their type."""

    def __init__(self) -> None:
        self._model: TransformersReference | None = None
        self._cached: CachedReference | None = None

    def load(self, checkpoint: str, threads: int, folder: str | None) -> str:
        """Returns the identity. What is loaded stays: the first of several that share it loads it."""
        if self._model is not None:
            return self._model.identity
        self._model = TransformersReference(checkpoint, threads=threads)
        self._cached = CachedReference(self._model, folder=None if folder is None else Path(folder))
        return self._model.identity

    def logits(self, tokens: tuple[int, ...], hidden: tuple[Hidden, ...]) -> Float32Array:
        assert self._cached is not None, "load comes first"
        return self._cached.logits(tokens, hidden)

    def cache(self, tokens: tuple[int, ...]) -> tuple[KeysAndValues, ...]:
        assert self._cached is not None, "load comes first"
        return self._cached.cache(tokens)

    def greedy(self, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
        assert self._model is not None, "load comes first"
        return self._model.greedy(tokens, count)


class RayReference:
    """A Reference that asks the actor. Can be sent to other Ray processes, which then share the actor.

    Every wait ends after ``seconds``. The actor ends with ``close`` or with the driver that started it.
    """

    def __init__(self, actor: Any, identity: str, seconds: float = CALL_SECONDS) -> None:
        self._actor = actor
        self._seconds = seconds
        self.identity = identity

    def logits(self, tokens: tuple[int, ...], hidden: tuple[Hidden, ...] = ()) -> Float32Array:
        """As Reference; raises InfrastructureError when the actor died, DeadlineExceeded when it is late."""
        rows: Float32Array = _get(self._actor.logits.remote(tokens, hidden), "logits", self._seconds)
        return rows

    def cache(self, tokens: tuple[int, ...]) -> tuple[KeysAndValues, ...]:
        """As Reference; raises as ``logits``."""
        computed: tuple[KeysAndValues, ...] = _get(self._actor.cache.remote(tokens), "K and V", self._seconds)
        return computed

    def greedy(self, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The ``count`` tokens that transformers' ``generate`` appends; raises as ``logits``."""
        chosen: tuple[int, ...] = _get(self._actor.greedy.remote(tokens, count), "greedy", self._seconds)
        return chosen

    def close(self) -> None:
        """End the actor's process; nothing happens if it has ended already."""
        if ray.is_initialized():
            ray.kill(self._actor)

    def __enter__(self) -> RayReference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_reference(
    checkpoint: str | Path,
    *,
    threads: int = 1,
    cache_folder: Path | None = None,
    load_seconds: float = LOAD_SECONDS,
    call_seconds: float = CALL_SECONDS,
) -> RayReference:
    """Load ``checkpoint`` into a new Ray actor on this machine; Ray must be running already.

    cache_folder: keeps logits between runs (see CachedReference).

    Raises:
        ReferenceUnavailable: torch or transformers is missing, or they refuse the checkpoint.
        CheckpointError: the folder has no complete set of safetensors.
        InfrastructureError: Ray is not running, or the actor did not start in ``load_seconds``.
    """
    begun = begin_reference(
        checkpoint,
        threads=threads,
        cache_folder=cache_folder,
        load_seconds=load_seconds,
        call_seconds=call_seconds,
    )
    return begun()


def begin_reference(
    checkpoint: str | Path,
    *,
    threads: int = 1,
    cache_folder: Path | None = None,
    load_seconds: float = LOAD_SECONDS,
    call_seconds: float = CALL_SECONDS,
) -> Callable[[], RayReference]:
    """As ``start_reference``, but what is returned waits for it: importing torch takes seconds.

    Raises InfrastructureError: Ray is not running.
    """
    actor = _new_actor()
    promise = _load(actor, checkpoint, threads, cache_folder)

    def loaded() -> RayReference:
        try:
            return RayReference(actor, _get(promise, "load", load_seconds), call_seconds)
        except BaseException:
            ray.kill(actor)
            raise

    return loaded


def offer_reference(name: str, checkpoint: Path | None) -> Any:
    """A Ray actor that other processes of the cluster ``share_reference``; it begins to load ``checkpoint``.

    checkpoint: None where it is not made yet. The actor ends when what is returned is forgotten, or with
    this process. Raises InfrastructureError.
    """
    actor = _new_actor(name)
    if checkpoint is not None:
        _load(actor, checkpoint, 1, None)
    return actor


def share_reference(name: str, checkpoint: str | Path) -> RayReference:
    """The reference offered as ``name``; the first who asks has it load ``checkpoint``.

    Raises as ``start_reference``.
    """
    try:
        actor = ray.get_actor(name, NAMESPACE)
    except ValueError as error:
        raise InfrastructureError(f"sought the run's reference {name}, found none: {error}") from error
    return RayReference(actor, _get(_load(actor, checkpoint, 1, None), "load", LOAD_SECONDS), CALL_SECONDS)


def _new_actor(name: str | None = None) -> Any:
    if not ray.is_initialized():
        raise InfrastructureError("the reference actor needs Ray, which is not running; start the farm first")
    # The checkpoint's folder is on this machine, which need not be where Ray has most room.
    # No CPU is claimed: it computes while devices wait, and a 1-core lab must not starve.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=0)(_ReferenceActor)
    return remote.options(name=name, namespace=NAMESPACE if name else None).remote()


def _load(actor: Any, checkpoint: str | Path, threads: int, folder: Path | None) -> Any:
    """A promise of the reference's identity."""
    arguments = (str(Path(checkpoint).resolve()), threads, None if folder is None else str(folder))
    return actor.load.remote(*arguments)


def _get(promise: Any, what: str, seconds: float) -> Any:
    """ray.get with a deadline, and Ray's errors as ours. What the reference itself refuses comes as it is."""
    try:
        return ray.get(promise, timeout=seconds)
    except GetTimeoutError:
        raise DeadlineExceeded(f"reference actor: no answer to {what} within {seconds:g} s") from None
    except RayTaskError as error:
        if isinstance(error.cause, HarnessError | KvEngineError | ValueError):
            raise error.cause from None
        raise InfrastructureError(f"reference actor failed in {what}: {error}") from error
    except RayActorError as error:
        raise InfrastructureError(f"reference actor died in {what}: {error}") from error
    except RayError as error:
        raise InfrastructureError(f"reference actor: Ray failed in {what}: {error}") from error
