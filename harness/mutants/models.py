"""The tiny checkpoints that mutants are run on: tiny-gemma3 with fewer layers and other windows."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from harness.synth import WEIGHTS, synth

# Local first, one global in between: what a local layer gets wrong must pass through a global one and back.
_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
_SCALED = {**_ROPE, "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}

# name: what its config.json says other than tiny-gemma3's
MODELS: dict[str, dict[str, Any]] = {
    **{f"w{window}": {"sliding_window": window, "layer_types": _LAYERS} for window in (2, 3, 4, 5)},
    "scaled": {"sliding_window": 4, "layer_types": _LAYERS, "rope_parameters": _SCALED},
    "local": {"sliding_window": 3, "layer_types": ["sliding_attention"] * 3},
}


def checkpoint(name: str, root: Path) -> Path:
    """The folder of model ``name`` under ``root``, written once; safe for several processes."""
    folder = root / name
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    whole = synth("tiny-gemma3", root / "tiny-gemma3")
    config = json.loads((whole / "config.json").read_text()) | MODELS[name]
    layers = config["num_hidden_layers"] = len(config["layer_types"])
    with tempfile.TemporaryDirectory(dir=root) as partial:
        new = Path(partial) / name
        new.mkdir()
        kept = {
            key: value
            for key, value in load_file(whole / WEIGHTS).items()
            if not key.startswith("model.layers.") or int(key.split(".")[2]) < layers
        }
        save_file(kept, new / WEIGHTS, metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(config, indent=2))
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder
