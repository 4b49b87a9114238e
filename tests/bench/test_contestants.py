"""Engines in processes of their own: answers, failures with their reason, environment from the start."""

from __future__ import annotations

import os

import numpy as np
import pytest

from bench import contestants
from bench.contestants import Contestant, Float32
from bench.errors import BenchError


class Fake:
    """Counts up from the last token of the prompt; each kind of ``trouble`` is one way to fail."""

    def __init__(self, trouble: str = "") -> None:
        self._trouble = trouble
        if trouble == "load":
            raise RuntimeError("no such model")

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
        if self._trouble == "raise":
            raise RuntimeError("it broke")
        if self._trouble == "die":
            os._exit(7)
        if self._trouble == "hang":
            import time

            time.sleep(60)
        tokens = [prompt[-1] + 1 + i for i in range(new_tokens)]
        return [0.0, 0.5, *(0.5 + 0.02 * (i + 1) for i in range(new_tokens - 1))], tokens

    def logits(self, prompt: list[int]) -> Float32:
        return np.array([len(prompt), "KVFARM_BENCH_TEST" in os.environ], np.float32)


def test_a_run_gives_first_token_gaps_and_tokens() -> None:
    with Contestant("fake", Fake) as fake:
        run = fake.run([3, 4], 3)
        assert fake.peak_rss_bytes() > 1 << 20
    assert run.ttft_ms == pytest.approx(500.0)
    assert run.itl_ms == pytest.approx((20.0, 20.0))
    assert run.tokens == (5, 6, 7)
    assert 0.0 <= run.elsewhere <= 1.0


def test_the_environment_reaches_that_process_and_no_other() -> None:
    with Contestant("fake", Fake, environment={"KVFARM_BENCH_TEST": "1"}) as fake:
        assert list(fake.logits([1, 2])) == [2.0, 1.0]
    assert "KVFARM_BENCH_TEST" not in os.environ


@pytest.mark.parametrize(
    ("trouble", "reason"), [("raise", "fake failed:(.|\n)*it broke"), ("die", "process ended with 7")]
)
def test_what_stops_a_contestant_is_said(trouble: str, reason: str) -> None:
    with Contestant("fake", Fake, (trouble,)) as fake, pytest.raises(BenchError, match=reason):
        fake.run([1], 2)


def test_one_that_cannot_load_is_said_at_once() -> None:
    with pytest.raises(BenchError, match="no such model"):
        Contestant("fake", Fake, ("load",))


def test_one_that_hangs_is_given_up_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(contestants, "END_SECONDS", 0.2)
    with Contestant("fake", Fake, ("hang",)) as fake, pytest.raises(BenchError, match="no answer within"):
        fake.run([1], 2)
    assert not fake.alive
