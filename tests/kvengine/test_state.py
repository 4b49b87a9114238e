"""Saved states: whose they are, that nothing altered passes, and that a refusal changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvengine.decoder import Decoder
from kvengine.engine import LocalEngine
from kvengine.errors import EngineFailure, StateError
from kvengine.plan import CacheDtype, CachePlan, PlanKind
from kvengine.recipe import ExportRecipe
from tests.conftest import OpenTiny

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 331, 20)]


@pytest.fixture(scope="module")
def hybrid(open_tiny: OpenTiny) -> LocalEngine:
    return open_tiny(ExportRecipe(cache=CachePlan("hybrid")))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["growing", "static", "hybrid"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_loaded_decoder_goes_on_to_the_last_bit(
    open_tiny: OpenTiny, tmp_path: Path, kind: PlanKind, dtype: CacheDtype, batch: int
) -> None:
    model = open_tiny(ExportRecipe(cache=CachePlan(kind, dtype))).model
    one, other = Decoder(model, 30, batch=batch), Decoder(model, 30, batch=batch)
    prompts: list[list[int]] = [TOKENS[: 15 - row] for row in range(batch)]
    one.start_rows(prompts)
    if kind == "hybrid":
        one.rewind(1)
    one.save(tmp_path / "state")
    other.extend([TOKENS[:9]] * batch)
    other.load(tmp_path / "state")
    assert other.rows.held == one.rows.held
    np.testing.assert_array_equal(other.newest_token(), one.newest_token())
    for _ in range(4):
        np.testing.assert_array_equal(other.step(), one.step())
    np.testing.assert_array_equal(other.decode([3] * batch), one.decode([3] * batch))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_the_file_is_as_long_as_what_is_held(hybrid: LocalEngine, tmp_path: Path) -> None:
    decoder = Decoder(hybrid.model, 1000)
    decoder.prefill(TOKENS)
    decoder.save(tmp_path / "state")
    assert decoder.kv_bytes > 1_000_000
    assert (tmp_path / "state").stat().st_size < 100_000


def test_a_state_of_something_else_is_refused(
    open_tiny: OpenTiny, hybrid: LocalEngine, tmp_path: Path
) -> None:
    path = tmp_path / "state"
    Decoder(hybrid.model, 30).save(path)
    static = open_tiny(ExportRecipe(cache=CachePlan("static"))).model
    others = {
        "artifact": Decoder(static, 30),
        "plan": Decoder(hybrid.model, 30, slack=1),
        "capacity": Decoder(hybrid.model, 31),
        "batch": Decoder(hybrid.model, 30, batch=2),
    }
    for what, decoder in others.items():
        with pytest.raises(StateError, match=f"sought a state of {what}"):
            decoder.load(path)


def test_no_altered_byte_and_no_shorter_file_is_taken(hybrid: LocalEngine, tmp_path: Path) -> None:
    path = tmp_path / "state"
    decoder = Decoder(hybrid.model, 30)
    decoder.prefill(TOKENS)
    decoder.save(path)
    right = path.read_bytes()
    undisturbed = decoder.fork()
    places = [*range(0, len(right), len(right) // 150), *range(200), len(right) - 1]
    for at in places:
        for wrong in (right[:at], right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :]):
            path.write_bytes(wrong)
            with pytest.raises(StateError):
                decoder.load(path)
    path.write_bytes(right + b"\0")
    with pytest.raises(StateError, match="truncated or was altered"):
        decoder.load(path)
    with pytest.raises(StateError, match="sought a saved state in"):
        decoder.load(tmp_path / "nowhere")
    np.testing.assert_array_equal(decoder.decode(3), undisturbed.decode(3))
    path.write_bytes(right)
    decoder.load(path)
    assert decoder.position == len(TOKENS)


def test_a_state_that_cannot_be_written_leaves_nothing(hybrid: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be written"):
        Decoder(hybrid.model, 30).save(tmp_path / "no such folder" / "state")
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_that_failed_can_be_loaded(hybrid: LocalEngine, tmp_path: Path) -> None:
    decoder = Decoder(hybrid.model, 30)
    decoder.prefill(TOKENS)
    decoder.save(tmp_path / "state")
    expected = decoder.fork().decode(3)
    decoder._failed = True
    with pytest.raises(EngineFailure):
        decoder.save(tmp_path / "other")
    decoder.load(tmp_path / "state")
    np.testing.assert_array_equal(decoder.decode(3), expected)


def test_a_fork_is_independent(hybrid: LocalEngine) -> None:
    decoder = Decoder(hybrid.model, 30)
    decoder.start(TOKENS)
    fork, alone = decoder.fork(), decoder.fork()
    decoder.reset()
    decoder.poison()
    for _ in range(3):
        np.testing.assert_array_equal(fork.step(), alone.step())
