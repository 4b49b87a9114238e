"""``pytest --devices=host --onnx=FILE``: a model of another exporter, deployed and judged like our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import foreign_models
from tests.foreign_models import WINDOW

SECONDS = 240
SMALL = ("--prompt=8", "--new-tokens=4", "--repeats=2", "--kvfarm-seed=7", "--examples=6")


def test_a_right_export_passes_and_a_wrong_one_fails_in_one_run(tmp_path: Path) -> None:
    checkpoint = foreign_models.checkpoint(tmp_path / "checkpoint", WINDOW)
    foreign_models.scattering(checkpoint, tmp_path / "right.onnx", rows=9)
    foreign_models.decomposed(checkpoint, tmp_path / "wrong.onnx", twist="window")
    command = [sys.executable, "-m", "pytest", f"--model={checkpoint}", "--devices=host", "--report=report"]
    command += ["--onnx=right.onnx", "--onnx=wrong.onnx", *SMALL]
    command += ["-k", "p01 or p02 or latency"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    results: dict[str, Any] = json.loads((tmp_path / "report" / "results.json").read_text())
    right, wrong = "onnx,model=right.onnx", "onnx,model=wrong.onnx"
    outcomes = {(check["check"], check["recipe"]): check["outcome"] for check in results["checks"]}
    assert outcomes[("test_p01_every_step_equals_the_reference", right)] == "passed"
    assert outcomes[("test_p01_every_step_equals_the_reference", wrong)] == "failed"
    # The one other property that was chosen needs a second export, and says so.
    assert outcomes[("test_p02_windowed_layers_equal_full_length_layers", right)] == "not_supported"
    assert "not supported: " in done.stdout
    assert "1 not supported by the model" in done.stdout
    assert "one cache plan" in (tmp_path / "report" / "index.html").read_text()
    # Measured like any other.
    assert {leg["recipe"] for leg in results["legs"]} == {right, wrong}
    failed = next(check for check in results["checks"] if check["outcome"] == "failed")
    assert f"--recipe {wrong}" in failed["replay"]
