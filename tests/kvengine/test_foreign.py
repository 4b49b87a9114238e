"""Driving a graph by its contract: cache bound in place or handed over, in any layout; refusals by type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from harness.reference import TransformersReference
from kvengine.artifact import MANIFEST, Artifact
from kvengine.decoder import Float32Array, Int64Array
from kvengine.engine import LocalEngine
from kvengine.errors import ArtifactError, ContextOverflow, InvalidRequest, NotSupported, RewindTooFar
from kvengine.export.foreign import adopt
from kvengine.foreign import ForeignDecoder, contract_of
from kvengine.program import Workload
from kvengine.recipe import SessionRecipe
from tests import foreign_models
from tests.foreign_models import HEAD_DIM, KV_HEADS, LAYERS, VOCABULARY, WINDOW

TOKENS = tuple(int(t) for t in np.random.default_rng(3).integers(0, VOCABULARY, 24))
ROWS = WINDOW + 4  # of the ring


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("driven")


@pytest.fixture(scope="module")
def full(folder: Path) -> Path:
    return foreign_models.checkpoint(folder / "full")


@pytest.fixture(scope="module")
def windowed(folder: Path) -> Path:
    return foreign_models.checkpoint(folder / "windowed", WINDOW)


@pytest.fixture(scope="module")
def expected(full: Path) -> Float32Array:
    return TransformersReference(full).logits(TOKENS)


def decoder(model: Path, checkpoint: Path, capacity: int = 32, **options: int) -> ForeignDecoder:
    artifact = adopt(model, checkpoint, model.parent / "artifacts")
    engine = LocalEngine.open(artifact.folder, SessionRecipe(threads=1))
    assert engine.decoder_type is ForeignDecoder
    return ForeignDecoder(engine.model, capacity, **options)


@pytest.mark.parametrize("layout", ["bnsh", "bsnh", "bnhs"])
def test_any_layout_is_told_by_the_axis_that_grows(
    full: Path, tmp_path: Path, expected: Float32Array, layout: str
) -> None:
    model = foreign_models.decomposed(full, tmp_path / "model.onnx", layout=layout)
    driven = decoder(model, full)
    assert {la.layout for la in contract_of(driven.model).layers} == {layout}
    found = driven.prefill(TOKENS, chunk=5, logits="all")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    (rows,) = {driven.read_cache(layer).key.shape for layer in range(LAYERS)}
    assert rows == (KV_HEADS, len(TOKENS), HEAD_DIM)
    driven.rewind(4)
    np.testing.assert_allclose(driven.prefill(TOKENS[-4:], logits="all"), expected[-4:], rtol=0, atol=1e-4)


def test_what_grows_is_handed_over_without_a_copy(full: Path, tmp_path: Path) -> None:
    driven = decoder(foreign_models.decomposed(full, tmp_path / "model.onnx"), full)
    driven.prefill(TOKENS[:3])
    layer = driven.cache._layers[0]  # type: ignore[attr-defined]
    given: list[int] = []
    bind = layer.bind

    def watch(binding: object) -> None:
        given.extend(value.data_ptr() for value in layer._values)
        bind(binding)

    layer.bind = watch
    kept = [value.data_ptr() for value in layer._values]
    driven.decode(TOKENS[3])
    assert given == kept
    assert driven.kv_bytes == 4 * 2 * LAYERS * KV_HEADS * HEAD_DIM * 4


def test_what_is_static_is_written_in_place(full: Path, tmp_path: Path, expected: Float32Array) -> None:
    driven = decoder(foreign_models.scattering(full, tmp_path / "model.onnx"), full)
    before = driven.kv_bytes
    key, _ = driven.cache.read(0)
    assert not key.any()
    driven.prefill(TOKENS[:3])
    assert key[0, :, :3].any()
    assert not key[0, :, 3:].any()
    assert driven.kv_bytes == before == 2 * LAYERS * KV_HEADS * 32 * HEAD_DIM * 4
    found = driven.prefill(TOKENS[3:], logits="all")
    np.testing.assert_allclose(found, expected[3:], rtol=0, atol=1e-4)


def test_past_that_others_read_gets_a_buffer_of_its_own(
    full: Path, tmp_path: Path, expected: Float32Array
) -> None:
    proto = onnx.load(foreign_models.scattering(full, tmp_path / "plain.onnx"))
    proto.graph.node.append(helper.make_node("ReduceMax", ["past_key_values.0.key"], ["largest"]))
    proto.graph.output.append(helper.make_tensor_value_info("largest", onnx.TensorProto.FLOAT, None))
    onnx.save(proto, tmp_path / "model.onnx")
    driven = decoder(tmp_path / "model.onnx", full)
    assert [la.shared for la in contract_of(driven.model).layers] == [False, True]
    found = driven.prefill(TOKENS, chunk=7, logits="all")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    driven.poison()
    driven.rewind(2)
    np.testing.assert_allclose(driven.prefill(TOKENS[-2:], logits="all"), expected[-2:], rtol=0, atol=1e-4)


def test_a_ring_is_never_given_more_than_it_can_take(windowed: Path, tmp_path: Path) -> None:
    """One shot of 24 tokens into a ring of 9 rows with a window of 5: steps of 5."""
    driven = decoder(foreign_models.scattering(windowed, tmp_path / "model.onnx", rows=ROWS), windowed)
    reference = TransformersReference(windowed).logits(TOKENS)
    steps: list[int] = []
    step = driven._step

    def watch(ids: Int64Array) -> Float32Array:
        steps.append(ids.shape[1])
        return step(ids)

    driven._step = watch  # type: ignore[method-assign]
    found = driven.prefill(TOKENS, logits="all")
    np.testing.assert_allclose(found, reference, rtol=0, atol=1e-4)
    assert steps == [5, 5, 5, 5, 4]
    assert max(steps) == ROWS - WINDOW + 1


def test_one_token_more_at_once_would_be_wrong(windowed: Path, tmp_path: Path) -> None:
    """So that the bound on a ring's step is no more than it must be."""
    driven = decoder(foreign_models.scattering(windowed, tmp_path / "model.onnx", rows=ROWS), windowed)
    driven._max_step = ROWS - WINDOW + 2
    reference = TransformersReference(windowed).logits(TOKENS)
    assert np.abs(driven.prefill(TOKENS, logits="all") - reference).max() > 0.1


def test_a_ring_rewinds_within_its_rows(windowed: Path, tmp_path: Path) -> None:
    driven = decoder(foreign_models.scattering(windowed, tmp_path / "model.onnx", rows=ROWS), windowed)
    reference = TransformersReference(windowed).logits(TOKENS)
    driven.prefill(TOKENS)
    limit = driven.plan.rewind_limit(driven.model.spec.layers[0], driven.capacity, len(TOKENS))
    with pytest.raises(RewindTooFar):
        driven.rewind(len(TOKENS) - limit + 1)
    driven.rewind(len(TOKENS) - limit)
    found = driven.prefill(TOKENS[limit:], logits="all")
    np.testing.assert_allclose(found, reference[limit:], rtol=0, atol=1e-4)
    # A kept prefix is rewound to in the same way.
    np.testing.assert_allclose(driven.reuse(TOKENS), reference[-1:], rtol=0, atol=1e-4)


def test_rows_of_a_batch_that_are_alike_run_together(
    full: Path, tmp_path: Path, expected: Float32Array
) -> None:
    driven = decoder(foreign_models.decomposed(full, tmp_path / "model.onnx"), full, batch=2)
    found = driven.prefill(np.array([TOKENS, TOKENS]), logits="all")
    np.testing.assert_allclose(found, np.concatenate([expected, expected]), rtol=0, atol=1e-4)
    with pytest.raises(NotSupported, match="same length"):
        driven.extend([(1,), ()])
    with pytest.raises(NotSupported, match="same length"):
        driven.extend([(1, 2), (3,)])
    assert driven.rows.held == [len(TOKENS)] * 2


def test_greedy_tokens_are_the_references(full: Path, tmp_path: Path) -> None:
    artifact = adopt(foreign_models.decomposed(full, tmp_path / "model.onnx"), full, tmp_path / "artifacts")
    engine = LocalEngine.open(artifact.folder, SessionRecipe(threads=1))
    measured = engine.run_workload(Workload(TOKENS[:4], 12, repeats=2))
    assert {sample.tokens for sample in measured.samples} == {
        TransformersReference(full).greedy(TOKENS[:4], 12)
    }
    assert measured.kv_bytes == (4 + 11) * 2 * LAYERS * KV_HEADS * HEAD_DIM * 4


def test_logits_of_the_last_row_alone(full: Path, tmp_path: Path, expected: Float32Array) -> None:
    driven = decoder(foreign_models.decomposed(full, tmp_path / "model.onnx", last_row=True), full)
    with pytest.raises(NotSupported, match="last token only"):
        driven.prefill(TOKENS, logits="all")
    assert driven.position == 0
    np.testing.assert_allclose(driven.prefill(TOKENS[:20]), expected[19:20], rtol=0, atol=1e-4)
    # Steps of one token have no other row than the last.
    found = driven.prefill(TOKENS[20:], chunk=1, logits="all")
    np.testing.assert_allclose(found, expected[20:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"capacity": 25}, {"batch": 0}, {"slack": -1}])
def test_what_the_graph_has_no_room_for_is_refused(full: Path, tmp_path: Path, wrong: dict[str, int]) -> None:
    model = foreign_models.scattering(full, tmp_path / "model.onnx", rows=24, circular=False)
    with pytest.raises(InvalidRequest, match="sought"):
        decoder(model, full, **{"capacity": 24, **wrong})
    driven = decoder(model, full, 24)
    driven.prefill(TOKENS)
    with pytest.raises(ContextOverflow):
        driven.decode(1)


def test_a_contract_edited_against_its_graph_is_refused(full: Path, tmp_path: Path) -> None:
    artifact = adopt(foreign_models.decomposed(full, tmp_path / "model.onnx"), full, tmp_path / "artifacts")
    manifest = (artifact.folder / MANIFEST).read_text()
    for old, new, message in (
        ("present.0.key", "present.0.kez", "the graph is not what its contract says"),
        ('"rank": 2', '"rank": 9', "at most two axes"),
        ("present.0.key", "present.0.value", "a name of its own"),
        ('"kv_heads": 2,', '"kv_heads": -2,', "makes no sense"),
    ):
        (artifact.folder / MANIFEST).write_text(manifest.replace(old, new))
        with pytest.raises(ArtifactError, match=message):
            LocalEngine.open(artifact.folder, SessionRecipe(threads=1))
    (artifact.folder / MANIFEST).write_text(manifest)
    assert Artifact.open(artifact.folder).id == artifact.id
