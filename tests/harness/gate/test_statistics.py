"""Bounds and p-values against other people's implementations and against values done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from harness.gate.statistics import (
    detectable,
    holm,
    interval,
    look_alpha,
    p_worse,
    proportion,
    sign_flip_p,
)

DATA = [0.012, -0.004, 0.021, 0.015, 0.003, 0.018, -0.001, 0.009]


def test_bounds_are_those_of_a_one_sample_t_test() -> None:
    found = interval(DATA, 0.01)
    theirs = stats.ttest_1samp(DATA, 0).confidence_interval(0.98)
    assert (float(found.low), float(found.high)) == pytest.approx((theirs.low, theirs.high))


def test_p_is_that_of_a_one_sided_t_test() -> None:
    assert float(p_worse(DATA)) == pytest.approx(stats.ttest_1samp(DATA, 0, alternative="greater").pvalue)


@pytest.mark.parametrize(("value", "p"), [(0.01, 0.0), (0.0, 1.0), (-0.01, 1.0)])
def test_data_without_spread_is_certain(value: float, p: float) -> None:
    assert float(p_worse([value] * 8)) == p


def test_many_gates_at_once_give_what_each_gives_alone() -> None:
    many = np.random.default_rng(1).normal(0, 0.02, (5, 3, 8))
    assert p_worse(many)[4, 1] == pytest.approx(float(p_worse(many[4, 1])))
    assert interval(many, 0.01).high[2, 0] == pytest.approx(float(interval(many[2, 0], 0.01).high))


def test_holm_by_hand() -> None:
    # 0.01 * 4, 0.02 * 3, max(0.06, 0.03 * 2), max(0.06, 0.04 * 1)
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_sign_flips_are_exact() -> None:
    assert sign_flip_p([0.01] * 8) == 1 / 256
    assert sign_flip_p([-0.01] * 8) == 1.0
    theirs = stats.permutation_test(
        (DATA,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert sign_flip_p(DATA) == pytest.approx(theirs.pvalue)


def test_drawn_sign_flips_come_near_the_exact_ones() -> None:
    data = np.random.default_rng(2).normal(0.004, 0.02, 32)
    assert sign_flip_p(data) == pytest.approx(float(p_worse(data)), abs=0.02)


def test_looks_share_one_alpha() -> None:
    assert 3 * look_alpha(0.01, 3) == pytest.approx(0.01)


def test_clopper_and_pearson() -> None:
    # The rule of three: nothing wrong in 100 trials is at most 3.6 %.
    assert proportion(0, 100) == pytest.approx((0.0, 1 - 0.025 ** (1 / 100)))
    assert proportion(0, 0) == (0.0, 1.0)


def test_what_is_called_detectable_is_detected() -> None:
    sd, blocks, alpha, margin = 0.02, 16, 0.01 / 3, math.log1p(0.03)
    true = math.log1p(detectable(sd, blocks, alpha, margin))
    data = np.random.default_rng(3).normal(true, sd, (4000, blocks))
    found = interval(data, alpha)
    share = ((found.low > 0) & (found.mean >= margin)).mean()
    assert 0.92 <= share <= 0.98
