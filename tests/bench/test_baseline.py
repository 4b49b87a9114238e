"""The one thing that genai's builder cannot read by itself."""

from __future__ import annotations

from types import SimpleNamespace

from bench.baseline import flatten_rope


def test_nested_rope_parameters_become_the_flat_ones_of_transformers_4() -> None:
    full = {"rope_type": "default", "rope_theta": 1_000_000}
    config = SimpleNamespace(
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000},
        }
    )
    flatten_rope(config)
    assert config.rope_theta == 1_000_000
    assert config.rope_local_base_freq == 10_000
    assert config.rope_parameters == full
