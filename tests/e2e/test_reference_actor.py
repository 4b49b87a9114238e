"""The reference behind a real Ray actor."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError
from harness.cluster import ensure_ray
from harness.reference import (
    CachedReference,
    RayReference,
    ReferenceUnavailable,
    TransformersReference,
    start_reference,
)
from harness.synth import synth
from kvengine.errors import CheckpointError

TOKENS = (5, 6, 7, 300, 2, 9, 11, 40)
WAIT_S = 60.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("tiny-gemma3", tmp_path_factory.mktemp("actor") / "tiny")


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    with ensure_ray():
        yield


@pytest.fixture(scope="module")
def reference(running_ray: None, tiny: Path, torch_was_here: bool) -> Iterator[RayReference]:
    with start_reference(tiny) as started:
        yield started


@pytest.fixture(scope="module")
def torch_was_here() -> bool:
    return "torch" in sys.modules


def _inside(reference: RayReference, function: Any) -> Any:
    """Run ``function`` on the object in the actor's process."""
    return ray.get(reference._actor.__ray_call__.remote(function), timeout=WAIT_S)


def test_torch_stays_out_of_this_process(reference: RayReference, torch_was_here: bool) -> None:
    reference.logits(TOKENS)
    assert ("torch" in sys.modules) == torch_was_here
    assert _inside(reference, lambda actor: "torch" in sys.modules)


def test_the_actor_answers_as_the_model_itself(reference: RayReference, tiny: Path) -> None:
    local = TransformersReference(tiny)
    logits = reference.logits(TOKENS)
    np.testing.assert_allclose(logits, local.logits(TOKENS), atol=1e-5)
    assert logits.dtype == np.float32
    assert not logits.flags.writeable
    assert reference.greedy(TOKENS, 8) == local.greedy(TOKENS, 8)
    assert reference.identity == local.identity


def test_logits_are_computed_once_for_all_who_ask(reference: RayReference) -> None:
    ask = ray.remote(num_cpus=0)(lambda shared: shared.logits(TOKENS))
    there = ray.get(ask.remote(reference), timeout=WAIT_S)
    np.testing.assert_array_equal(there, reference.logits(TOKENS))
    np.testing.assert_array_equal(there[:3], reference.logits(TOKENS[:3]))
    assert _inside(reference, lambda actor: actor._cached.used_bytes) == there.nbytes


def test_logits_outlive_the_actor_where_a_folder_is_given(
    running_ray: None, tiny: Path, tmp_path: Path
) -> None:
    with start_reference(tiny, cache_folder=tmp_path) as started:
        logits = started.logits(TOKENS)
    kept = CachedReference(started, folder=tmp_path)  # asking the closed actor itself would fail
    np.testing.assert_array_equal(kept.logits(TOKENS), logits)


def test_the_callers_mistake_comes_back_as_itself(reference: RayReference) -> None:
    with pytest.raises(ValueError, match="331 is outside the vocabulary"):
        reference.logits((331,))


def test_no_checkpoint_is_a_checkpoint_error(running_ray: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        start_reference(tmp_path)


def test_an_unknown_architecture_comes_back_as_itself(running_ray: None, tmp_path: Path) -> None:
    folder = synth("tiny-gemma3", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma99"}))
    with pytest.raises(ReferenceUnavailable, match="gemma99"):
        start_reference(folder)


def test_a_dead_actor_is_an_infrastructure_error(running_ray: None, tiny: Path) -> None:
    with start_reference(tiny) as started:
        os.kill(_inside(started, lambda actor: os.getpid()), signal.SIGKILL)
        with pytest.raises(InfrastructureError, match="reference actor died in logits"):
            started.logits(TOKENS)


def test_a_hanging_actor_is_a_missed_deadline(running_ray: None, tiny: Path) -> None:
    with start_reference(tiny, call_seconds=0.2) as started:
        process = _inside(started, lambda actor: os.getpid())
        os.kill(process, signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineExceeded, match="no answer to logits"):
                started.logits(TOKENS)
        finally:
            os.kill(process, signal.SIGCONT)


def test_loading_has_a_deadline_too(running_ray: None, tiny: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="no answer to load"):
        start_reference(tiny, load_seconds=0.01)


def test_close_ends_the_process_and_later_calls_say_so(running_ray: None, tiny: Path) -> None:
    started = start_reference(tiny)
    process = _inside(started, lambda actor: os.getpid())
    started.close()
    started.close()
    with pytest.raises(InfrastructureError, match="reference actor died"):
        started.logits(TOKENS)
    deadline = Deadline(WAIT_S)
    while _alive(process):
        deadline.check("end of the actor's process")
        time.sleep(0.02)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_without_ray_the_error_says_what_to_start(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(InfrastructureError, match="Ray, which is not running"):
        start_reference(tiny)
