"""onnxruntime-genai itself runs our artifacts, and says the same tokens.

In a process of its own: genai keeps threads and a copy of onnxruntime's environment for its whole life,
and should it crash, that is a failed test and not the end of all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from harness.presets import PRESETS
from harness.recipes import parse_recipe
from harness.reference import TransformersReference
from harness.synth import synth
from kvengine.artifact import Artifact
from kvengine.engine import LocalEngine
from kvengine.export import export
from kvengine.export.datafile import NAME
from kvengine.export.genai import GRAPH
from kvengine.program import Workload
from kvengine.recipe import ExportRecipe, SessionRecipe
from tests.conftest import ExportTiny

PROMPT = (282, 211, 170, 91, 103, 16, 27, 8)  # after which no model says its end token within TOKENS
TOKENS = 32  # together eight windows of the tiny models
FAMILIES = [name for name in PRESETS if name.startswith("tiny-")]
# Of the first family alone: what changes the graph's cache or weights.
RECIPES = ("static", "naive", "hybrid-int8kv,slack=2", "hybrid-int4kv,slack=0", "hybrid-fp16kv", "int4")

RUN = """
import json, sys
import kvengine
import numpy, onnxruntime_genai as genai
for folder, prompt, count in json.load(sys.stdin):
    model = genai.Model(folder)
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + count)
    generator = genai.Generator(model, options)
    generator.append_tokens(numpy.array(prompt, numpy.int32))
    found = []
    while len(found) < count and not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    print(json.dumps(found), flush=True)
"""


def genai_tokens(artifacts: list[Artifact]) -> list[tuple[int, ...]]:
    """Greedy tokens of each artifact, by onnxruntime-genai with the artifact's own genai_config.json."""
    request = json.dumps([(str(artifact.folder), PROMPT, TOKENS) for artifact in artifacts])
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=request, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def our_tokens(artifact: Artifact) -> tuple[int, ...]:
    engine = LocalEngine.open(artifact.folder, SessionRecipe(threads=1))
    return engine.run_workload(Workload(PROMPT, TOKENS, repeats=1, warmup=0)).samples[0].tokens


def test_every_family_gives_the_same_tokens_there(tmp_path: Path) -> None:
    expected, artifacts = [], []
    for name in FAMILIES:
        checkpoint = synth(name, tmp_path / name)
        artifact = export(checkpoint, tmp_path / f"{name}-a", parse_recipe("hybrid,slack=2").export)
        assert our_tokens(artifact) == TransformersReference(checkpoint).greedy(PROMPT, TOKENS)
        expected.append(our_tokens(artifact))
        artifacts.append(artifact)
    found = genai_tokens(artifacts)
    assert dict(zip(FAMILIES, found, strict=True)) == dict(zip(FAMILIES, expected, strict=True))
    assert len(set(expected)) == len(FAMILIES)


def test_every_cache_plan_gives_the_same_tokens_there(export_tiny: ExportTiny) -> None:
    artifacts = {name: export_tiny(parse_recipe(name).export) for name in RECIPES}
    expected = [our_tokens(artifact) for artifact in artifacts.values()]
    found = genai_tokens(list(artifacts.values()))
    assert dict(zip(RECIPES, found, strict=True)) == dict(zip(RECIPES, expected, strict=True))


def test_no_weight_is_stored_twice(export_tiny: ExportTiny) -> None:
    """Both graphs name the same bytes of the same file; what they hold themselves is small."""
    folder = export_tiny(ExportRecipe()).folder
    ours, theirs = (
        {
            tensor.name: [(entry.key, entry.value) for entry in tensor.external_data]
            for tensor in onnx.load(folder / name, load_external_data=False).graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        for name in ("model.onnx", GRAPH)
    )
    assert ours == theirs
    assert {value for pairs in theirs.values() for key, value in pairs if key == "location"} == {NAME}
    inside = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(folder / GRAPH, load_external_data=False).graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
    ]
    assert max(np.asarray(array).nbytes for array in inside) <= 4 * 64  # a norm; no rotary table


@pytest.mark.parametrize("recipe", ["hybrid,slack=3", "static"])
def test_the_config_says_which_layers_slide(recipe: str, export_tiny: ExportTiny) -> None:
    artifact = export_tiny(parse_recipe(recipe).export)
    path = artifact.extra("genai_config.json")
    assert path is not None
    decoder = json.loads(path.read_text())["model"]["decoder"]
    assert decoder["filename"] == GRAPH
    if recipe == "static":
        assert "sliding_window" not in decoder
    else:
        window = decoder["sliding_window"]
        assert (window["window_size"], window["cache_slack"], window["layers"]) == (5, 3, [0, 1, 3, 4])
