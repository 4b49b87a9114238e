"""``kvfarm inspect``: the contract for people and for scripts, and what to say where it is not clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvengine.codec import decode
from kvengine.contract import Contract
from tests import foreign_models
from tests.foreign_models import WINDOW
from tests.harness.test_cli import Line


@pytest.fixture
def kvfarm(capsys: pytest.CaptureFixture[str]) -> Line:
    return Line(capsys)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_models.checkpoint(tmp_path_factory.mktemp("inspected") / "windowed", WINDOW)


@pytest.fixture(scope="module")
def ring(checkpoint: Path) -> Path:
    return foreign_models.scattering(checkpoint, checkpoint.parent / "ring.onnx", rows=9)


def test_a_clear_model_is_shown(kvfarm: Line, checkpoint: Path, tmp_path: Path) -> None:
    model = foreign_models.decomposed(checkpoint, tmp_path / "model.onnx")
    assert kvfarm("inspect", model) == 0
    for word in ("decomposed attention", "past_key_values.0.key → present.0.key", "growing, handed over"):
        assert word in kvfarm.stdout
    assert "position_ids" in kvfarm.stdout
    found = kvfarm.json("inspect", model)
    assert kvfarm.code == 0
    contract = decode(Contract, found["contract"])
    assert (found["complete"], found["weights"], found["questions"]) == (True, "float32", [])
    assert len(contract.layers) == foreign_models.LAYERS


def test_what_is_not_clear_is_asked_for(kvfarm: Line, ring: Path, checkpoint: Path) -> None:
    assert kvfarm("inspect", ring) == 1
    assert "--set past.window=…" in kvfarm.stdout
    found = kvfarm.json("inspect", ring)
    assert kvfarm.code == 1
    assert (found["complete"], found["contract"]) == (False, None)
    assert [question["key"] for question in found["questions"]] == ["past.window"]
    assert kvfarm("inspect", ring, "--set", f"past.window={WINDOW}") == 0
    assert "windowed of 9 rows, shared buffer" in kvfarm.stdout
    assert kvfarm("inspect", ring, "--model", checkpoint) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "past.window"], "sought KEY=VALUE"),
        (["--set", "past.window=wide"], "sought a whole number"),
        (["--set", "past.colour=red"], "unknown"),
    ],
)
def test_a_senseless_answer_is_refused(kvfarm: Line, ring: Path, options: list[str], message: str) -> None:
    assert kvfarm("inspect", ring, *options) == 2
    assert message in kvfarm.stderr


def test_what_is_no_model_is_refused(kvfarm: Line, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    found = kvfarm.json("inspect", tmp_path / "text.onnx")
    assert kvfarm.code == 2
    assert found["error"]["type"] == "InvalidModel"
    assert kvfarm("inspect", tmp_path / "none.onnx") == 2
