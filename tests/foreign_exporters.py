"""What other people's exporters really make of the checkpoint of ``tests.foreign_models``."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import load_file

_FIXTURE = Path(__file__).parent / "fixtures" / "optimum-mistral.onnx.gz"
# As bench.baseline drives it: a checkpoint of weights alone has no tokenizer to save.
_BUILD = """
import importlib, os, sys
import kvengine
from transformers import AutoConfig
builder = importlib.import_module("onnxruntime_genai.models.builder")
importlib.import_module("builders.base").Model.save_processing = lambda *_: None
for source, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    config = AutoConfig.from_pretrained(source)
    details = {"extra_kwargs": {}, "hf_name": source, "hf_config": config}
    builder.create_model("", source, folder, "fp32", "cpu", folder + "/scratch", hf_details=details)
"""


def optimum(source: Path, path: Path) -> Path:
    """What optimum 2.1.0 exports (optimum-onnx 0.1.0, transformers 4.57.6, torch 2.13.0), with the window.

    Its transformers is older than ours, so it cannot run here: tests/fixtures holds the graph made by
    ``main_export(source, output, task="text-generation-with-past", library_name="transformers")``, without
    its matrices, which are filled in from ``source`` by the names of the nodes that use them.
    """
    model = onnx.load_from_string(gzip.decompress(_FIXTURE.read_bytes()))
    weights = load_file(str(source / "model.safetensors"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for name in node.input:
            if name in tensors and len(tensors[name].dims) == 2:
                matrix = weights[_weight_of(node.name)]
                found = matrix if node.op_type == "Gather" else matrix.T
                assert list(found.shape) == list(tensors[name].dims)
                tensors[name].raw_data = np.ascontiguousarray(found).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def genai(sources: dict[str, Path], root: Path) -> dict[str, Path]:
    """What the installed onnxruntime-genai's builder makes of each, float32 for the CPU.

    All in one process, which takes 4 s to import what the builder needs.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _BUILD]
    for name, source in sources.items():
        (root / name).mkdir(parents=True)
        command += [str(source), str(root / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: root / name / "model.onnx" for name in sources}


def _weight_of(node: str) -> str:
    """/model/layers.0/mlp/up_proj/MatMul to model.layers.0.mlp.up_proj.weight"""
    return re.sub(r"/(MatMul|Gather)$", ".weight", node).strip("/").replace("/", ".")
