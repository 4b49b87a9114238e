"""``kvfarm inspect``: the contract for people and for scripts, and what to say where it is not clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.recipes import parse_recipe
from kvengine.codec import decode
from kvengine.contract import Contract
from kvengine.export.foreign import adopt
from tests import foreign_models
from tests.conftest import ExportTiny
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


def test_a_checkpoint_that_is_not_its_own_is_named(kvfarm: Line, ring: Path, tmp_path: Path) -> None:
    other = foreign_models.checkpoint(tmp_path / "other", WINDOW + 2)
    assert kvfarm("inspect", ring, "--set", f"past.window={WINDOW}", "--model", other) == 1
    said = f"window of layer 0, 1: sought {WINDOW + 2} (config.json), found {WINDOW}"
    assert f"contradicts {other}: {said}" in kvfarm.stdout
    found = kvfarm.json("inspect", ring, "--set", f"past.window={WINDOW}", "--model", other)
    assert (kvfarm.code, found["contradictions"]) == (1, [said])
    assert kvfarm("inspect", ring, "--model", foreign_models.checkpoint(tmp_path / "own", WINDOW)) == 0


def test_an_artifact_of_ours_points_to_its_graph_for_others(
    kvfarm: Line, export_tiny: ExportTiny, tmp_path: Path
) -> None:
    folder = export_tiny(parse_recipe("hybrid,slack=2").export).folder
    for path in (folder, folder / "model.onnx", folder / "artifact.json"):
        found = kvfarm.json("inspect", path)
        assert (kvfarm.code, found["error"]["type"]) == (2, "UnsupportedModel")
        assert f"{path} is an artifact of kvfarm's" in found["error"]["message"]
        assert f"is {folder / 'genai.onnx'}: inspect that" in found["error"]["message"]
    assert kvfarm("inspect", folder / "genai.onnx") == 0
    assert "windowed" in kvfarm.stdout


def test_an_artifact_that_was_brought_is_inspected(kvfarm: Line, checkpoint: Path, tmp_path: Path) -> None:
    model = foreign_models.decomposed(checkpoint, tmp_path / "theirs.onnx")
    adopted = adopt(model, checkpoint, tmp_path / "artifacts")
    assert kvfarm("inspect", adopted.model_path) == 0
