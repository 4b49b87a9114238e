"""Every family's tiny checkpoint: transformers loads it, and whatever a cache or an exporter gets
wrong by one shows in its logits. (tiny-gemma3 and what all presets share: test_synth.py.)
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.presets import PRESETS, parameter_count
from harness.reference import TransformersReference
from harness.synth import synth
from harness.tolerances import FLOAT32

FAMILIES = [name for name in PRESETS if name.startswith("tiny-") and name != "tiny-gemma3"]
WINDOWED = [name for name in FAMILIES if PRESETS[name].config.get("sliding_window")]
TOLERANCE = FLOAT32.logits or 0.0
SHOWS = 100 * TOLERANCE  # a cache bug must move the logits by more


class Subject:
    """The model, and the logits of four sequences of 48 tokens."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.torch = torch
        config = AutoConfig.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, attn_implementation="eager"
        ).eval()
        self.module = importlib.import_module(type(self.model).__module__)
        self.tokens = torch.tensor(np.random.default_rng(1).integers(3, config.vocab_size, (4, 48)))

    def logits(self) -> Any:
        with self.torch.no_grad():
            return self.model(self.tokens, use_cache=False).logits.numpy()

    @property
    def attentions(self) -> list[Any]:
        return [layer.self_attn for layer in self.model.model.layers]

    @property
    def frequencies(self) -> Any:
        """float32 [rotary_dim / 2]"""
        return self.model.model.rotary_emb.inv_freq.clone()

    def set_frequencies(self, values: Any) -> None:
        for name in ("inv_freq", "original_inv_freq"):  # LongRoPE copies one to the other at every call
            getattr(self.model.model.rotary_emb, name).copy_(values)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: synth(name, root / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def unchanged(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return {name: Subject(folder).logits() for name, folder in checkpoints.items()}


def least_move(logits: Any, unchanged: Any) -> float:
    """The largest logit difference of the sequence where it is smallest."""
    return float(np.abs(logits - unchanged).max(axis=(1, 2)).min())


Patch = pytest.MonkeyPatch
Mutant = Callable[[Subject, Patch], None]


def window_by(step: int) -> Mutant:
    def mutate(subject: Subject, _: Patch) -> None:
        subject.model.config.sliding_window += step  # the mask is made from the config at each call

    return mutate


def base_by_one_percent(subject: Subject, _: Patch) -> None:
    frequencies = subject.frequencies
    share = subject.torch.arange(len(frequencies)) / len(frequencies)
    subject.set_frequencies(frequencies * 1.01 ** (-share))


def table_by_one_frequency(subject: Subject, _: Patch) -> None:
    frequencies = subject.frequencies
    subject.set_frequencies(frequencies * frequencies[1] / frequencies[0])


def queries_by_one_position(subject: Subject, patch: Patch) -> None:
    rotate, angle = subject.module.apply_rotary_pos_emb, subject.frequencies.repeat(2)

    def shifted(q: Any, k: Any, cos: Any, sin: Any, *rest: Any) -> tuple[Any, Any]:
        later = cos * angle.cos() - sin * angle.sin(), sin * angle.cos() + cos * angle.sin()
        return rotate(q, k, *later, *rest)[0], rotate(q, k, cos, sin, *rest)[1]

    patch.setattr(subject.module, "apply_rotary_pos_emb", shifted)


def heads_by_one(subject: Subject, patch: Patch) -> None:
    patch.setattr(
        subject.module,
        "repeat_kv",
        lambda rows, groups: rows.repeat_interleave(groups, dim=1).roll(1, dims=1),
    )


def heads_tiled(subject: Subject, patch: Patch) -> None:
    patch.setattr(subject.module, "repeat_kv", lambda rows, groups: rows.repeat(1, groups, 1, 1))


def without_attention_softcap(subject: Subject, _: Patch) -> None:
    for attention in subject.attentions:
        attention.attn_logit_softcapping = None


def without_logit_softcap(subject: Subject, _: Patch) -> None:
    subject.model.config.final_logit_softcapping = None


def softcap_of_the_scores_ten_percent_off(subject: Subject, _: Patch) -> None:
    for attention in subject.attentions:
        attention.attn_logit_softcapping *= 1.1


def every_layer_rotates(subject: Subject, _: Patch) -> None:
    for attention in subject.attentions:
        attention.use_rope = True


def without_key_bias(subject: Subject, _: Patch) -> None:
    for attention in subject.attentions:
        attention.k_proj.bias = None


def factors_of_long_texts(subject: Subject, _: Patch) -> None:
    config = subject.model.config.rope_parameters
    short, long = (subject.torch.tensor(config[f"{kind}_factor"]) for kind in ("short", "long"))
    subject.set_frequencies(subject.frequencies * short / long)


def unscaled_frequencies(subject: Subject, _: Patch) -> None:
    theta, size = subject.model.config.rope_parameters["rope_theta"], 2 * len(subject.frequencies)
    subject.set_frequencies(theta ** (-subject.torch.arange(0, size, 2) / size))


def without_rotary_magnitude(subject: Subject, _: Patch) -> None:
    subject.model.model.rotary_emb.attention_scaling = 1.0


EVERYWHERE: tuple[Mutant, ...] = (
    base_by_one_percent,
    table_by_one_frequency,
    queries_by_one_position,
    heads_by_one,
    heads_tiled,
)
OWN: dict[str, tuple[Mutant, ...]] = {
    "tiny-gemma2": (
        without_attention_softcap,
        without_logit_softcap,
        softcap_of_the_scores_ten_percent_off,
    ),
    "tiny-llama": (unscaled_frequencies,),
    "tiny-phi3": (factors_of_long_texts, without_rotary_magnitude),
    "tiny-qwen2": (without_key_bias,),
    "tiny-qwen3": (unscaled_frequencies, without_rotary_magnitude),
    "tiny-smollm3": (every_layer_rotates,),
}
MUTANTS: list[tuple[str, str, Mutant]] = [
    (name, mutant.__name__, mutant) for name in FAMILIES for mutant in (*EVERYWHERE, *OWN.get(name, ()))
]
MUTANTS += [(name, f"window {step:+d}", window_by(step)) for name in WINDOWED for step in (-1, +1)]


def test_the_families_of_issue_4_are_there() -> None:
    kinds = {preset.config["model_type"] for preset in PRESETS.values()}
    assert kinds == {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3"}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_it_whole_and_without_a_warning(
    name: str, checkpoints: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoints[name], output_loading_info=True
        )
    assert type(model).__name__ == PRESETS[name].config["architectures"][0]
    assert not any(found.values())
    assert model.num_parameters() == parameter_count(PRESETS[name])


@pytest.mark.parametrize(
    ("name", "mutant"), [(n, m) for n, _, m in MUTANTS], ids=[f"{n}-{title}" for n, title, _ in MUTANTS]
)
def test_off_by_one_shows_in_the_logits(
    name: str,
    mutant: Mutant,
    checkpoints: dict[str, Path],
    unchanged: dict[str, Any],
    monkeypatch: Patch,
) -> None:
    subject = Subject(checkpoints[name])
    mutant(subject, monkeypatch)
    assert least_move(subject.logits(), unchanged[name]) > SHOWS


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mutation_that_changes_nothing_does_not_show(
    name: str, checkpoints: dict[str, Path], unchanged: dict[str, Any]
) -> None:
    subject = Subject(checkpoints[name])
    subject.set_frequencies(subject.frequencies)
    np.testing.assert_array_equal(subject.logits(), unchanged[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_rounding_noise_stays_far_below_the_tolerance(
    name: str, checkpoints: dict[str, Path], unchanged: dict[str, Any]
) -> None:
    subject = Subject(checkpoints[name])
    subject.model.double()
    assert np.abs(subject.logits() - unchanged[name]).max() < TOLERANCE / 3


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_spread_and_greedy_generation_does_not_settle_on_one_token(
    name: str, checkpoints: dict[str, Path], unchanged: dict[str, Any]
) -> None:
    assert 0.7 < unchanged[name].std() < 1.5
    chosen = TransformersReference(checkpoints[name]).greedy((5, 6, 7), 60)
    assert len(set(chosen)) > 20
