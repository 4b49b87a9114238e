"""The oracle: transformers without a cache, and the cache of its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from harness.reference import CachedReference, ReferenceUnavailable, TransformersReference
from harness.reference.protocol import Hidden, KeysAndValues
from harness.synth import WEIGHTS, synth
from kvengine.errors import CheckpointError
from kvengine.export.config import read_architecture

Float32Array = npt.NDArray[np.float32]
VOCABULARY = 331
TOKENS = tuple(int(token) for token in np.random.default_rng(3).integers(0, VOCABULARY, 24))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("tiny-gemma3", tmp_path_factory.mktemp("reference") / "tiny")


@pytest.fixture(scope="module")
def reference(tiny: Path) -> TransformersReference:
    return TransformersReference(tiny)


def test_a_row_of_logits_for_every_token(reference: TransformersReference) -> None:
    logits = reference.logits(TOKENS)
    assert logits.shape == (len(TOKENS), VOCABULARY)
    assert logits.dtype == np.float32
    assert not logits.flags.writeable


def test_each_row_is_what_the_sequence_so_far_gives(reference: TransformersReference) -> None:
    """One pass over the whole sequence is every step of a decode."""
    logits = reference.logits(TOKENS)
    for count in (1, 2, 5, 6, 17):
        np.testing.assert_allclose(reference.logits(TOKENS[:count]), logits[:count], atol=3e-5)


def test_keys_and_values_of_every_position_are_there_also_behind_a_window(
    tiny: Path, reference: TransformersReference
) -> None:
    spec = read_architecture(tiny).spec
    tokens = tuple(range(40, 40 + 3 * 5))
    whole, part = reference.cache(tokens), reference.cache(tokens[:4])
    assert len(whole) == len(spec.layers)
    for layer, (key, value), (early, _) in zip(spec.layers, whole, part, strict=True):
        assert key.shape == value.shape == (layer.kv_heads, len(tokens), layer.head_dim)
        np.testing.assert_allclose(key[:, :4], early, atol=1e-4)


def test_the_logits_are_gemma3s(tiny: Path, reference: TransformersReference) -> None:
    """Against the class itself with PyTorch's own attention and transformers' own cache, token by token."""
    import torch
    from transformers import Gemma3ForCausalLM

    model = Gemma3ForCausalLM.from_pretrained(tiny, attn_implementation="sdpa").eval()
    rows, cache = [], None
    with torch.no_grad():
        for token in TOKENS:
            output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, 0].numpy())
    np.testing.assert_allclose(reference.logits(TOKENS), np.stack(rows), atol=5e-5)


def test_greedy_is_the_argmax_of_the_logits(reference: TransformersReference) -> None:
    prompt, count = (5, 6, 7), 40
    chosen = reference.greedy(prompt, count)
    logits = reference.logits(prompt + chosen)
    assert chosen == tuple(int(token) for token in logits[len(prompt) - 1 : -1].argmax(axis=-1))


def test_greedy_does_not_stop_at_the_end_of_sequence_token(tmp_path: Path) -> None:
    folder = synth("tiny-gemma3", tmp_path / "m")
    expected = TransformersReference(folder).greedy((5, 6, 7), 10)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"eos_token_id": expected[3]}))
    assert TransformersReference(folder).greedy((5, 6, 7), 10) == expected


@pytest.mark.parametrize(
    ("tokens", "message"),
    [((), "at least one token"), ((5, VOCABULARY), "331 is outside"), ((-1,), "-1 is outside")],
)
def test_tokens_that_make_no_sense_are_refused(
    reference: TransformersReference, tokens: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reference.logits(tokens)
    with pytest.raises(ValueError, match=message):
        reference.greedy(tokens, 1)


def test_the_identity_tells_checkpoints_apart(
    tiny: Path, tmp_path: Path, reference: TransformersReference
) -> None:
    other = TransformersReference(synth("tiny-gemma3", tmp_path / "m", seed=1))
    assert other.identity != reference.identity
    assert TransformersReference(tiny).identity == reference.identity
    assert "transformers 5" in reference.identity


def test_bfloat16_weights_are_computed_in_float32(tmp_path: Path, tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tmp_path / "narrow")
    AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32).save_pretrained(
        tmp_path / "widened"
    )
    assert json.loads((tmp_path / "narrow/config.json").read_text())["dtype"] == "bfloat16"
    narrow = TransformersReference(tmp_path / "narrow").logits(TOKENS)
    np.testing.assert_array_equal(narrow, TransformersReference(tmp_path / "widened").logits(TOKENS))


def test_of_a_composite_model_the_text_path_is_used(
    tiny: Path, tmp_path: Path, reference: TransformersReference
) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = json.loads((tiny / "config.json").read_text())
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=330,
        boi_token_index=328,
        eoi_token_index=329,
    )
    model = Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(_text_weights(tiny))
    model.save_pretrained(tmp_path / "composite")
    composite = TransformersReference(tmp_path / "composite")
    np.testing.assert_allclose(composite.logits(TOKENS), reference.logits(TOKENS), atol=1e-6)
    assert composite.greedy(TOKENS, 5) == reference.greedy(TOKENS, 5)


def _text_weights(folder: Path) -> dict[str, object]:
    import torch

    weights = load_file(folder / WEIGHTS)
    return {name.removeprefix("model."): torch.from_numpy(value) for name, value in weights.items()}


def test_a_missing_tensor_is_not_replaced_by_a_random_one(tmp_path: Path) -> None:
    folder = synth("tiny-gemma3", tmp_path / "m")
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.2.self_attn.k_norm.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ReferenceUnavailable, match=r"layers\.2\.self_attn\.k_norm"):
        TransformersReference(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        TransformersReference(tmp_path)


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = synth("tiny-gemma3", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma99"}))
    with pytest.raises(ReferenceUnavailable, match="gemma99"):
        TransformersReference(folder)


def test_without_torch_the_extra_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # the import then fails as if it were not installed
    with pytest.raises(ReferenceUnavailable, match=r"kvfarm\[reference\]"):
        TransformersReference(tiny)


def test_importing_the_reference_does_not_import_torch() -> None:
    code = "import sys, harness.reference; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


class Counting:
    """A causal reference: row i is the sum of tokens[0..i], in each of two columns."""

    def __init__(self, identity: str = "counting") -> None:
        self.identity = identity
        self.asked: list[tuple[int, ...]] = []

    def logits(self, tokens: tuple[int, ...], hidden: tuple[Hidden, ...] = ()) -> Float32Array:
        self.asked.append(tokens)
        return _sums(tokens)

    def cache(self, tokens: tuple[int, ...]) -> tuple[KeysAndValues, ...]:
        self.asked.append(tokens)
        return ((_sums(tokens)[None], _sums(tokens)[None]),)


def _sums(tokens: tuple[int, ...]) -> Float32Array:
    return np.repeat(np.cumsum(tokens, dtype=np.float32)[:, None], 2, axis=1)


ROW = 2 * 4  # bytes


def test_a_sequence_is_computed_once() -> None:
    inner = Counting()
    cached = CachedReference(inner)
    for _ in range(3):
        np.testing.assert_array_equal(cached.logits((1, 2, 3)), _sums((1, 2, 3)))
    assert inner.asked == [(1, 2, 3)]
    assert cached.identity == "counting"


def test_keys_and_values_are_computed_once() -> None:
    inner = Counting()
    cached = CachedReference(inner)
    for _ in range(3):
        ((key, value),) = cached.cache((1, 2, 3))
        np.testing.assert_array_equal(key, value)
    assert inner.asked == [(1, 2, 3)]


def test_a_longer_sequence_answers_for_its_prefixes() -> None:
    inner = Counting()
    cached = CachedReference(inner)
    cached.logits((1, 2, 3, 4))
    np.testing.assert_array_equal(cached.logits((1, 2)), _sums((1, 2)))
    assert inner.asked == [(1, 2, 3, 4)]


@pytest.mark.parametrize("tokens", [(1, 3), (1, 2, 3, 4), (2, 3)])
def test_no_other_sequence_is_taken_for_a_prefix(tokens: tuple[int, ...]) -> None:
    cached = CachedReference(Counting())
    cached.logits((1, 2, 3))
    np.testing.assert_array_equal(cached.logits(tokens), _sums(tokens))


def test_a_prefix_is_not_kept_twice() -> None:
    cached = CachedReference(Counting())
    for count in range(1, 6):
        cached.logits(tuple(range(count)))
    assert cached.used_bytes == 5 * ROW


def test_nobody_can_alter_what_is_kept(tmp_path: Path) -> None:
    for cached in (
        CachedReference(Counting(), folder=tmp_path),
        CachedReference(Counting(), folder=tmp_path),
    ):
        for tokens in ((1, 2, 3), (1, 2)):
            with pytest.raises(ValueError, match="read-only"):
                cached.logits(tokens)[0, 0] = 7.0


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    inner = Counting()
    cached = CachedReference(inner, memory_bytes=4 * ROW)
    cached.logits((1, 1))
    cached.logits((2, 2))
    cached.logits((1,))  # uses (1, 1)
    cached.logits((3, 3))
    assert cached.used_bytes == 4 * ROW
    inner.asked.clear()
    cached.logits((1, 1))
    assert inner.asked == []
    cached.logits((2, 2))
    assert inner.asked == [(2, 2)]


def test_what_is_larger_than_the_memory_pushes_nothing_out() -> None:
    inner = Counting()
    cached = CachedReference(inner, memory_bytes=2 * ROW)
    cached.logits((1, 1))
    np.testing.assert_array_equal(cached.logits((2, 2, 2)), _sums((2, 2, 2)))
    cached.logits((1, 1))
    assert inner.asked == [(1, 1), (2, 2, 2)]


def test_on_disk_logits_outlive_the_process(tmp_path: Path) -> None:
    CachedReference(Counting(), folder=tmp_path / "logits").logits((1, 2, 3))
    inner = Counting()
    again = CachedReference(inner, folder=tmp_path / "logits")
    np.testing.assert_array_equal(again.logits((1, 2, 3)), _sums((1, 2, 3)))
    assert inner.asked == []
    assert [path.suffix for path in (tmp_path / "logits").iterdir()] == [".npy"]


def test_another_checkpoint_does_not_get_these_logits(tmp_path: Path) -> None:
    CachedReference(Counting(), folder=tmp_path).logits((1, 2, 3))
    other = Counting("another checkpoint")
    CachedReference(other, folder=tmp_path).logits((1, 2, 3))
    assert other.asked == [(1, 2, 3)]


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_a_damaged_file_is_computed_again(tmp_path: Path, content: bytes | None) -> None:
    CachedReference(Counting(), folder=tmp_path).logits((1, 2, 3))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] if content is None else content)
    np.testing.assert_array_equal(
        CachedReference(Counting(), folder=tmp_path).logits((1, 2, 3)), _sums((1, 2, 3))
    )
    assert path.read_bytes() == whole


def test_the_disk_is_bounded_and_the_oldest_goes_first(tmp_path: Path) -> None:
    cached = CachedReference(Counting(), folder=tmp_path)
    sequences = [(1, 1), (2, 2), (3, 3)]
    names = []
    for age, tokens in enumerate(sequences):
        before = set(tmp_path.iterdir())
        cached.logits(tokens)
        (path,) = set(tmp_path.iterdir()) - before
        os.utime(path, ns=(age, age))
        names.append(path.name)
    size = path.stat().st_size
    CachedReference(Counting(), folder=tmp_path, folder_bytes=2 * size).logits((4, 4))
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2
    assert names[2] in left
