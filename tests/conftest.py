"""Shared by all rooms: one tiny checkpoint and its artifacts, made once a session."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.synth import synth
from kvengine.artifact import Artifact
from kvengine.engine import LocalEngine
from kvengine.export import export
from kvengine.recipe import ExportRecipe, SessionRecipe

ExportTiny = Callable[[ExportRecipe], Artifact]
OpenTiny = Callable[[ExportRecipe], LocalEngine]

# adbd, also the fake one, ends what it started by SIGHUP, which nohup has every child ignore; and a script's
# background jobs ignore SIGINT, which tests send as Ctrl-C.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Else a call of Ray's where none was started starts one, which nobody ends. Ray's import reads it.
assert "ray" not in sys.modules
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"


# Files whose tests take longest, begun first: at the end no worker waits for another's last minutes.
LONGEST = ("e2e/", "soak/", "harness/test_parallel.py", "test_docs.py", "harness/test_mutants.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Also called, in this checkout, for the suite over devices, which lies elsewhere.
    long = tuple(f"{Path(__file__).parent}/{each}" for each in LONGEST)
    items.sort(key=lambda item: not str(item.path).startswith(long))


@pytest.fixture(scope="session", autouse=True)
def _no_phones_of_the_users() -> Iterator[None]:
    """``farm`` without a farm.toml takes in what the user's adb server knows; here nothing listens there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def _leases_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For farms that several tests share. Other runs on this machine are no concern of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFARM_LEASES", str(tmp_path_factory.mktemp("leases")))
        yield


@pytest.fixture(autouse=True)
def _leases_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the test starts."""
    monkeypatch.setenv("KVFARM_LEASES", str(tmp_path / "leases"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``tiny-gemma3`` preset on disk."""
    return synth("tiny-gemma3", tmp_path_factory.mktemp("checkpoints") / "tiny-gemma3")


@pytest.fixture(scope="session")
def export_tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportTiny:
    """Export the tiny checkpoint with a recipe; the same recipe is exported once."""
    root = tmp_path_factory.mktemp("artifacts")
    made: dict[ExportRecipe, Artifact] = {}

    def make(recipe: ExportRecipe) -> Artifact:
        if recipe not in made:
            made[recipe] = export(tiny_checkpoint, root / str(len(made)), recipe)
        return made[recipe]

    return make


@pytest.fixture(scope="session")
def open_tiny(export_tiny: ExportTiny) -> OpenTiny:
    """An engine on the tiny checkpoint with a recipe, in this process, on one thread."""

    def make(recipe: ExportRecipe) -> LocalEngine:
        return LocalEngine.open(export_tiny(recipe).folder, SessionRecipe(threads=1))

    return make
