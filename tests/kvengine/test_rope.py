"""Rotary tables of every RoPE type are transformers', to the rounding of float32."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kvengine.errors import UnsupportedModel
from kvengine.export import load_spec
from kvengine.rope import inverse_frequencies, rope_tables
from kvengine.spec import ModelSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 331,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
PHI = LLAMA | {"model_type": "phi3", "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LONG = {
    "short_factor": [1.0 + 0.05 * i for i in range(32)],
    "long_factor": [1.0 + i for i in range(32)],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": LLAMA | {"rope_theta": 500_000},
    "linear": LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": LLAMA | {"rope_parameters": LLAMA3},
    "llama3, transformers 4": LLAMA | {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
    "yarn": LLAMA | {"rope_parameters": YARN},
    "yarn, every setting": LLAMA
    | {
        "rope_parameters": YARN
        | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.5}
    },
    "yarn, attention factor": LLAMA | {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "longrope": PHI | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4} | LONG},
    "su, transformers 4": PHI
    | {"rope_theta": 1e4, "rope_scaling": {"type": "su", "original_max_position_embeddings": 512} | LONG},
    "longrope, partial": PHI
    | {"partial_rotary_factor": 0.5, "rope_theta": 1e4}
    | {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": LONG["short_factor"][:16],
            "long_factor": LONG["long_factor"][:16],
        }
    },
}


def theirs(config: dict[str, Any], tokens: int) -> tuple[Any, Any]:
    """cos and sin of positions 0..tokens-1 as the model computes them: one half, the other repeats it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(tokens)[None])
    return (table[0, :, : table.shape[-1] // 2].numpy() for table in (cos, sin))  # type: ignore[return-value]


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_are_those_of_transformers(name: str) -> None:
    spec: ModelSpec = load_spec(CONFIGS[name])
    found = rope_tables(spec.ropes[0], 300, spec.layers[0].head_dim)
    for ours, expected in zip(found, theirs(CONFIGS[name], 300), strict=True):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, atol=4e-5)  # 1 ulp of an angle of 300 rad is 3e-5


def test_every_type_is_told_apart() -> None:
    """So that the test above compares nine different tables and not one."""
    tables = [load_spec(config).ropes[0] for config in CONFIGS.values()]
    frequencies = {
        inverse_frequencies(rope, 64).tobytes() + bytes(str(rope.magnitude), "ascii") for rope in tables
    }
    assert len(frequencies) == len(CONFIGS) - 2  # two are another spelling of their neighbour


def test_a_longrope_model_stops_where_its_factors_would_change() -> None:
    """Catalogue 24: past it transformers rotates every key anew, which a cache cannot follow."""
    config = CONFIGS["longrope"]
    assert load_spec(config).max_position == 512
    within, beyond = (next(iter(theirs(config, tokens))) for tokens in (512, 513))
    assert abs(within - beyond[:512]).max() > 0.5
    assert load_spec(CONFIGS["yarn"]).max_position == 4096


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'.*cached key anew"),
        ({"rope_type": ["llama3"]}, "llama3.*supported"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor < high_freq_factor"),
        ({**LLAMA3, "factor": None}, "factor"),
        (YARN | {"beta_fast": 0.5}, "beta_slow < beta_fast"),
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 31}, "list of 32 positive numbers"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 31 + [0.0]}, "list of 32 positive numbers"),
        ([1.0], "rope_parameters: sought an object"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(rope: Any, said: str) -> None:
    rope = {"rope_theta": 1e4} | rope if isinstance(rope, dict) else rope
    with pytest.raises(UnsupportedModel, match=said):
        load_spec(LLAMA | {"rope_parameters": rope})


@pytest.mark.parametrize(("factor", "said"), [(0.4, "multiple of 16"), (1.5, "supported"), (0.0, "positive")])
def test_a_share_of_rotating_channels_that_the_kernel_cannot_do(factor: float, said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        load_spec(PHI | {"partial_rotary_factor": factor})
