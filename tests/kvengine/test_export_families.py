"""Every row of the table of families computes what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvengine.artifact import Artifact
from kvengine.export import export
from kvengine.export.families import FAMILIES
from kvengine.plan import CachePlan
from kvengine.recipe import ExportRecipe
from tests.kvengine.export_support import TOKENS, engine_logits, reference_logits

GEOMETRY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 5,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.0,
    },
    "gemma3_text": {"head_dim": 32, "sliding_window": 5, "query_pre_attn_scalar": 24},
    "llama": {"head_dim": 32},
    "mistral": {"sliding_window": 5, "head_dim": 32},
    "phi3": {
        "sliding_window": 5,
        "hidden_size": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.1 * i for i in range(8)],
        },
    },
    "smollm3": {
        "head_dim": 32,
        "sliding_window": 5,
        "use_sliding_window": True,
        "no_rope_layers": [1, 0, 1, 0],
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "head_dim": 32},
}
WINDOWS = {
    "gemma2": [5, None, 5, None],
    "gemma3_text": [5, 5, 5, 5],
    "phi3": [5] * 4,
    "smollm3": [None, 5, None, 5],
    "llama": [None] * 4,
    "mistral": [5] * 4,
    "qwen2": [None, None, 5, 5],
    "qwen3": [None, None, 5, 5],
}


def checkpoint_of(family: str, folder: Path) -> Path:
    """A small model whose attention is peaked and whose biases and norms are not trivial."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(GEOMETRY | SETTINGS[family]))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.15))
            assert "bias" not in name or family == "qwen2"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family, tmp_path / "checkpoint")
    expected = reference_logits(checkpoint, TOKENS)
    artifact: Artifact = export(checkpoint, tmp_path / "a", ExportRecipe(cache=CachePlan("hybrid", slack=1)))
    assert [layer.window for layer in artifact.manifest.spec.layers] == WINDOWS[family]
    for chunk in (0, 1, 7):
        assert abs(engine_logits(artifact, TOKENS, chunk) - expected).max() < 1e-4
    rounded = export(checkpoint, tmp_path / "b", ExportRecipe(weights="int8"))
    error = (engine_logits(rounded, TOKENS) - expected).std() / expected.std()
    assert error < 0.1
