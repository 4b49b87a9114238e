"""Synthetic checkpoints: ordinary Hugging Face folders whose weights let cache bugs show."""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from harness import synth as synth_module
from harness.presets import PRESETS, parameter_count, tensors
from harness.reference.transformers_reference import TransformersReference
from harness.synth import WEIGHTS, SynthError, synth
from harness.tolerances import FLOAT32

TINY = "tiny-gemma3"
SHOWS = 100 * (FLOAT32.logits or 0.0)  # a cache bug must move the logits by more


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(TINY, tmp_path_factory.mktemp("synth") / TINY)


def test_the_1b_preset_has_the_real_geometry() -> None:
    # google/gemma-3-1b-it's config.json and parameter count
    preset = PRESETS["gemma-3-1b"]
    real = {
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "vocab_size": 262_144,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10_000,
        "rope_theta": 1_000_000,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    assert {key: preset.config[key] for key in real} == real
    assert preset.dtype == "bfloat16"
    assert parameter_count(preset) == 999_885_952


def test_the_1b_config_means_the_same_to_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(PRESETS["gemma-3-1b"].config))
    config = AutoConfig.from_pretrained(tmp_path)
    kinds = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)]
    assert config.layer_types == kinds
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000


def test_the_tiny_preset_separates_what_is_easily_confused() -> None:
    config = PRESETS[TINY].config
    assert config["sliding_window"] <= 5
    assert config["layer_types"][0] == "sliding_attention"
    assert "full_attention" in config["layer_types"]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]
    assert config["head_dim"] != config["query_pre_attn_scalar"]
    assert config["vocab_size"] < 1000
    assert config["hidden_size"] % 32 == config["intermediate_size"] % 32 == 0


def test_transformers_loads_it_whole_and_without_a_warning(
    tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    transformers.logging.set_verbosity_warning()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, found = transformers.AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    finally:
        transformers.logging.set_verbosity_error()
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert not any(found.values())
    assert "warn" not in capfd.readouterr().err.lower()
    assert model.num_parameters() == parameter_count(PRESETS[TINY])


def test_the_file_is_what_the_table_says(tiny: Path) -> None:
    with safe_open(tiny / WEIGHTS, "np") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert found == {tensor.name: tensor.shape for tensor in tensors(PRESETS[TINY])}
    assert metadata["format"] == "pt"  # transformers 4 loads no other
    weights = load_file(tiny / WEIGHTS)
    for tensor in tensors(PRESETS[TINY]):
        values, error = weights[tensor.name], 5 * tensor.std / tensor.size**0.5
        assert values.dtype == np.float32
        assert abs(values.mean() - tensor.mean) < error, tensor.name
        assert abs(values.std() - tensor.std) < error, tensor.name


def _without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth_module, "_WORKERS", 1)


def test_the_bytes_depend_on_the_seed_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_threads(monkeypatch)
    same = synth(TINY, tmp_path / "same")
    other = synth(TINY, tmp_path / "other", seed=1)
    assert (same / WEIGHTS).read_bytes() == (tiny / WEIGHTS).read_bytes()
    a, b = load_file(tiny / WEIGHTS), load_file(other / WEIGHTS)
    assert all((a[name] != b[name]).mean() > 0.99 for name in a)


def test_tensors_and_chunks_do_not_repeat_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth_module, "_CHUNK", 1 << 10)
    weights = load_file(synth(TINY, tmp_path / "m") / WEIGHTS)
    values = np.concatenate([tensor.ravel() for name, tensor in weights.items() if "_proj" in name])
    assert len(np.unique(values)) > 0.9 * values.size
    normals = np.concatenate([w.ravel() * w.shape[1] ** 0.5 for n, w in weights.items() if "_proj" in n])
    assert len(np.unique(normals.round(5))) > 0.3 * normals.size


def test_bfloat16_is_rounded_from_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = dataclasses.replace(PRESETS[TINY], name="narrow", dtype="bfloat16")
    monkeypatch.setitem(PRESETS, "narrow", narrow)
    wide = load_file(synth(TINY, tmp_path / "wide") / WEIGHTS)
    for name, values in load_file(synth("narrow", tmp_path / "narrow") / WEIGHTS).items():
        assert values.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(values, wide[name].astype(ml_dtypes.bfloat16))


def test_progress_ends_at_the_size_of_the_weights(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        threads.add(threading.current_thread())

    synth(TINY, tmp_path / "m", progress=progress)
    size = 4 * parameter_count(PRESETS[TINY])
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {size}
    assert seen[-1][0] == size
    assert threads == {threading.current_thread()}


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth(TINY, tmp_path / "m", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_second_call_leaves_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    folder = synth(TINY, tmp_path / "m")
    before = (folder / WEIGHTS).stat()
    assert synth(TINY, folder) == folder
    assert (folder / WEIGHTS).stat() == before


def _another_seed(folder: Path) -> None:
    synth(TINY, folder, seed=7)


def _somebodys_work(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("draft")


def _truncated(folder: Path) -> None:
    path = synth(TINY, folder) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])


def _another_config(folder: Path) -> None:
    path = synth(TINY, folder) / "config.json"
    path.write_text(path.read_text().replace('"sliding_window": 5', '"sliding_window": 6'))


@pytest.mark.parametrize("occupy", [_another_seed, _somebodys_work, _truncated, _another_config])
def test_anything_else_in_the_folder_is_refused_and_kept(
    tmp_path: Path, occupy: Callable[[Path], None]
) -> None:
    occupy(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    with pytest.raises(SynthError, match="remove it or name another"):
        synth(TINY, tmp_path / "m")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_unknown_preset_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SynthError, match=r"tiny-gemma3, tiny-llama, .*gemma-3-1b"):
        synth("gemma-9", tmp_path / "m")


# What a cache bug does, done to the model itself. "By one" means, for
# - the window: one token more or less;
# - RoPE: the query one position further than its keys believe (a shift of both changes nothing,
#   RoPE being relative); the table read one frequency further, theta ** (-2 (j + 1) / head_dim);
#   the base wrong by one percent; the base of the other kind of layer;
# - the head map: each query head on its neighbour's KV head, or KV heads tiled instead of repeated.

LOCAL, GLOBAL = "sliding_attention", "full_attention"
OTHER = {LOCAL: GLOBAL, GLOBAL: LOCAL}


class Mutable:
    """The model, and the logits of four sequences of 48 tokens."""

    def __init__(self, folder: Path, **change: Any) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        for key, value in change.items():
            setattr(config, key, value)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, attn_implementation="eager"
        ).eval()
        self.tokens = torch.tensor(np.random.default_rng(1).integers(3, config.vocab_size, (4, 48)))

    def logits(self, **options: Any) -> Any:
        with self.torch.no_grad():
            return self.model(self.tokens, use_cache=False, **options).logits.numpy()

    def frequencies(self, kind: str) -> Any:
        """float32 [head_dim / 2]: the layer kind's RoPE table, writable."""
        return getattr(self.model.model.rotary_emb, f"{kind}_inv_freq")

    def theta(self, kind: str) -> float:
        return float(self.model.config.rope_parameters[kind]["rope_theta"])

    def set_theta(self, kind: str, theta: float) -> None:
        size = 2 * len(self.frequencies(kind))
        self.frequencies(kind).copy_(1.0 / theta ** (self.torch.arange(0, size, 2).float() / size))


def window_by(step: int) -> Callable[[Mutable], None]:
    def mutate(subject: Mutable) -> None:
        subject.model.config.sliding_window += step  # the mask is made from the config at each call

    return mutate


def base_by_one_percent(kind: str) -> Callable[[Mutable], None]:
    return lambda subject: subject.set_theta(kind, 1.01 * subject.theta(kind))


def base_of_the_other_kind(kind: str) -> Callable[[Mutable], None]:
    return lambda subject: subject.set_theta(kind, subject.theta(OTHER[kind]))


def table_by_one_frequency(kind: str) -> Callable[[Mutable], None]:
    def mutate(subject: Mutable) -> None:
        table = subject.frequencies(kind)
        table.mul_(table[1] / table[0])

    return mutate


def queries_by_one_position(kind: str) -> Callable[[Mutable], None]:
    """Rotating by one position before RoPE is RoPE at the next position."""

    def mutate(subject: Mutable) -> None:
        from transformers.models.gemma3.modeling_gemma3 import rotate_half

        angle = subject.frequencies(kind).repeat(2)

        def rotate(module: object, inputs: object, query: Any) -> Any:
            return query * angle.cos() + rotate_half(query) * angle.sin()

        for layer in subject.model.model.layers:
            if layer.self_attn.layer_type == kind:
                layer.self_attn.q_norm.register_forward_hook(rotate)

    return mutate


MUTANTS: dict[str, Callable[[Mutable], None]] = {
    "window one longer": window_by(+1),
    "window one shorter": window_by(-1),
    **{
        f"{kind}: {name}": make(kind)
        for kind in (LOCAL, GLOBAL)
        for name, make in {
            "RoPE base one percent off": base_by_one_percent,
            "RoPE base of the other kind": base_of_the_other_kind,
            "RoPE table one frequency on": table_by_one_frequency,
            "queries one position on": queries_by_one_position,
        }.items()
    },
}


@pytest.fixture(scope="module")
def unchanged(tiny: Path) -> Any:
    return Mutable(tiny).logits()


def _least_move(logits: Any, unchanged: Any) -> float:
    """The largest logit difference of the sequence where it is smallest."""
    return float(np.abs(logits - unchanged).max(axis=(1, 2)).min())


@pytest.mark.parametrize("name", MUTANTS)
def test_off_by_one_shows_in_the_logits(tiny: Path, unchanged: Any, name: str) -> None:
    subject = Mutable(tiny)
    MUTANTS[name](subject)
    assert _least_move(subject.logits(), unchanged) > SHOWS


def test_a_mutation_that_changes_nothing_does_not_show(tiny: Path, unchanged: Any) -> None:
    subject = Mutable(tiny)
    window_by(0)(subject)
    for kind in (LOCAL, GLOBAL):
        subject.set_theta(kind, subject.theta(kind))
    np.testing.assert_array_equal(subject.logits(), unchanged)


@pytest.fixture
def head_map(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any, int], Any]], None]:
    from transformers.models.gemma3 import modeling_gemma3

    return lambda mapping: monkeypatch.setattr(modeling_gemma3, "repeat_kv", mapping)


def test_a_head_map_off_by_one_shows_in_the_logits(tiny: Path, unchanged: Any, head_map: Any) -> None:
    # keys and values come as [batch, KV heads, tokens, head_dim]
    subject = Mutable(tiny)
    head_map(lambda rows, groups: rows.repeat_interleave(groups, dim=1))
    np.testing.assert_array_equal(subject.logits(), unchanged)
    head_map(lambda rows, groups: rows.repeat_interleave(groups, dim=1).roll(1, dims=1))
    assert _least_move(subject.logits(), unchanged) > SHOWS
    head_map(lambda rows, groups: rows.repeat(1, groups, 1, 1))
    assert _least_move(subject.logits(), unchanged) > SHOWS


def test_attention_is_peaked_and_its_heads_differ(tiny: Path) -> None:
    subject = Mutable(tiny)
    with subject.torch.no_grad():
        layers = subject.model(subject.tokens, use_cache=False, output_attentions=True).attentions
    for kind, weights in zip(subject.model.config.layer_types, layers, strict=True):
        late = weights[:, :, 8:].numpy()  # [sequence, head, query, key], windows full
        uniform = 1 / 5 if kind == LOCAL else 1 / 28
        assert late.max(axis=-1).mean() > 3 * uniform
        distance = (
            np.abs(late[:, 0] - late[:, 1]).sum(axis=-1).mean()
        )  # two heads on one KV head; 2 is disjoint
        assert distance > 0.5


def test_rounding_noise_stays_far_below_the_tolerance(tiny: Path, unchanged: Any) -> None:
    """Another order of summation, float64, and weights a millionth off: no chaos."""
    tolerance = FLOAT32.logits
    assert tolerance is not None
    subject = Mutable(tiny)
    subject.model.set_attn_implementation("sdpa")
    assert np.abs(subject.logits() - unchanged).max() < tolerance / 3
    subject = Mutable(tiny)
    subject.model.double()
    assert np.abs(subject.logits() - unchanged).max() < tolerance / 3
    subject = Mutable(tiny)
    with subject.torch.no_grad():
        table = subject.model.model.embed_tokens.weight
        table.mul_(1 + 1e-6 * subject.torch.sign(table))
        table[:, ::2].mul_(1 - 2e-6)
    assert np.abs(subject.logits() - unchanged).max() < 1e-3


def test_logits_spread(unchanged: Any) -> None:
    assert 0.8 < unchanged.std() < 1.3
    assert unchanged.std(axis=-1).min() > 0.8


@pytest.mark.parametrize("prompt", [(5, 6, 7), (2, 100, 17), (300,), (8, 8, 8)])
def test_greedy_generation_does_not_settle_on_one_token(tiny: Path, prompt: tuple[int, ...]) -> None:
    chosen = TransformersReference(tiny).greedy(prompt, 120)
    assert len(set(chosen)) > 30
    assert len(set(chosen[-40:])) > 10
