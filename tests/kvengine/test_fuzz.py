"""Whatever stands in config.json or artifact.json: it works, or one typed error says why. Never a hang.

``KVFARM_FUZZ`` sets how many documents of each kind are tried; ``make soak`` tries 10,000.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from harness.presets import PRESETS
from harness.recipes import parse_recipe
from harness.synth import synth
from kvengine.artifact import Artifact
from kvengine.codec import decode, encode
from kvengine.engine import LocalEngine
from kvengine.errors import ArtifactError, KvEngineError
from kvengine.export import export
from kvengine.export.config import read_architecture
from kvengine.program import Decode, Prefill, Program
from kvengine.recipe import ExportRecipe, SessionRecipe
from kvengine.sanity import wrong_in_spec
from kvengine.spec import ModelSpec
from tests.kvengine.mutate import damaged, entries

CASES = int(os.environ.get("KVFARM_FUZZ", "250"))
CASE_SECONDS = 60.0  # one takes milliseconds; on a starved machine one has been seen to take 20 s
EXPORTED = 12  # of the configs that are accepted, so many are exported too, or a tenth
FAMILIES = [name for name in PRESETS if name.startswith("tiny-")]
EVEN_WHEN_FINE = Program(8, (Prefill((5, 6, 7)), Decode((8,))))


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Fail, in the middle of whatever hangs, after ``seconds``."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"{what}: not done within {seconds:g} s")

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("fuzz")
    return [synth(name, root / name) for name in FAMILIES]


def configs(checkpoints: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Real config.json files: every family in the transformers 5 or 4 spelling, and a composite one."""
    found = [(folder, json.loads((folder / "config.json").read_text())) for folder in checkpoints]
    gemma = next(config for _, config in found if config["model_type"] == "gemma3_text")
    old = {key: value for key, value in gemma.items() if key not in ("rope_parameters", "layer_types")} | {
        "sliding_window_pattern": 3,
        "rope_local_base_freq": 100.0,
        "rope_theta": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    composite = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": gemma, "vision_config": {}}
    return [*found, (checkpoints[0], old), (checkpoints[0], composite)]


def test_any_config_is_a_model_or_a_typed_refusal(checkpoints: list[Path], tmp_path: Path) -> None:
    sources = configs(checkpoints)
    outcomes: Counter[str] = Counter()
    exported = 0
    for seed in range(CASES):
        source, config = sources[seed % len(sources)]
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "config.json").write_bytes(damaged(config, seed))
        with within(CASE_SECONDS, f"config of seed {seed}"):
            try:
                spec = read_architecture(folder).spec
            except KvEngineError as refusal:
                outcomes[_kind(refusal)] += 1
                shutil.rmtree(folder)
                continue
            # What is accepted makes sense to the device that gets it.
            assert list(wrong_in_spec(spec)) == []
            assert decode(ModelSpec, json.loads(json.dumps(encode(spec)))) == spec
            if exported < max(EXPORTED, CASES // 10):
                exported += 1
                outcomes[_exported(source, folder, tmp_path / "artifact")] += 1
            outcomes["accepted"] += 1
        shutil.rmtree(folder)
    assert outcomes["UnsupportedModel"] > CASES // 10, outcomes
    assert outcomes["CheckpointError"] > CASES // 50, outcomes
    assert outcomes["accepted"] > CASES // 10, outcomes
    assert "megabytes of message" not in outcomes


def _kind(refusal: KvEngineError) -> str:
    """The error's name; its message must be one that a person can read."""
    return type(refusal).__name__ if len(str(refusal)) < 2000 else "megabytes of message"


def _exported(source: Path, folder: Path, output: Path) -> str:
    """What becomes of an accepted config with the weights that it was damaged beside."""
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    try:
        artifact = export(folder, output, ExportRecipe())
        LocalEngine.open(artifact.folder, SessionRecipe(threads=1)).run_program(EVEN_WHEN_FINE)
    except KvEngineError as refusal:
        return f"export: {type(refusal).__name__}"
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return "exported"


@pytest.fixture(scope="module")
def artifacts(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("fuzzed")
    recipes = ("hybrid,slack=2", "static", "hybrid-int8kv,slack=1", "naive")
    chosen = zip(checkpoints, (*recipes, *recipes, *recipes), strict=False)
    return [export(c, root / c.name, parse_recipe(name).export).folder for c, name in chosen]


def test_any_manifest_is_an_artifact_or_a_typed_refusal(artifacts: list[Path], tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(CASES):
        source = artifacts[seed % len(artifacts)]
        folder = tmp_path / str(seed)
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "artifact.json").unlink()
        manifest = json.loads((source / "artifact.json").read_text())
        (folder / "artifact.json").write_bytes(damaged(manifest, seed))
        with within(CASE_SECONDS, f"manifest of seed {seed}"):
            try:
                engine = LocalEngine.open(folder, SessionRecipe(threads=1))
                observations = engine.run_program(EVEN_WHEN_FINE)
            except KvEngineError as refusal:
                outcomes[_kind(refusal)] += 1
            else:
                # Only what does not reach the arithmetic was damaged.
                assert all(observation.error is None for observation in observations)
                outcomes["opened"] += 1
        shutil.rmtree(folder)
    assert outcomes["ArtifactError"] > CASES // 2, outcomes
    assert set(outcomes) <= {"ArtifactError", "opened"}, outcomes


@pytest.mark.parametrize("recipe", ["hybrid,slack=2", "static", "hybrid-int8kv,slack=1", "naive"])
def test_no_number_of_spec_and_recipe_can_be_altered(
    recipe: str, checkpoints: list[Path], tmp_path: Path
) -> None:
    """Any of them would give wrong logits, or buffers of another size than onnxruntime writes to."""
    folder = export(checkpoints[0], tmp_path / "a", parse_recipe(recipe).export).folder
    manifest = json.loads((folder / "artifact.json").read_text())
    altered = 0
    for part in ("spec", "recipe", "plan"):
        for holder, key in list(_numbers(manifest[part])):
            right = holder[key]
            holder[key] = right + 1
            (folder / "artifact.json").write_text(json.dumps(manifest))
            with pytest.raises(ArtifactError):
                LocalEngine.open(folder, SessionRecipe(threads=1), verify=False)
            holder[key] = right
            altered += 1
    assert altered > 20
    (folder / "artifact.json").write_text(json.dumps(manifest))
    LocalEngine.open(folder, SessionRecipe(threads=1), verify=False)


def _numbers(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in entries(value):
        if type(inner) in (int, float):
            yield value, key
        yield from _numbers(inner)


def test_an_altered_byte_anywhere_in_an_artifact_is_refused(artifacts: list[Path], tmp_path: Path) -> None:
    """Files that a device gets when it opens them, the others when they are asked for."""
    chance = random.Random(0)
    for source in artifacts[:2]:
        names = [path.name for path in source.iterdir() if path.name != "artifact.json"]
        for name in names:
            folder = Path(shutil.copytree(source, tmp_path / f"{source.name}-{name}"))
            data = bytearray((folder / name).read_bytes())
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            (folder / name).write_bytes(data)
            with pytest.raises(ArtifactError, match="was altered"):
                Artifact.open(folder).extra(name)
