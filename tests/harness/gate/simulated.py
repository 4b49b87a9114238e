"""A whole gate simulated at the level of legs: thousands of them at once, with drift and AR(1) noise.

No device has any part in it. A session warms up (linear drift), its speed wanders (AR(1) from leg to
leg), and every leg scatters on its own; blocks are ABBA or BAAB by a coin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.gate.judging import decide
from harness.gate.statistics import ALPHA, LOOKS, holm, interval, look_alpha, p_worse

Array = npt.NDArray[np.float64]
INCONCLUSIVE, PASS, REGRESSED = 0, 1, 2


@dataclass(frozen=True)
class Simulated:
    """verdicts: [gates, cells] after the last look. blocks: [gates, cells] that were needed."""

    verdicts: npt.NDArray[np.int_]
    blocks: npt.NDArray[np.int_]


def block_data(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    sd: float,
    loss: float,
    drift: float = 0.006,
    ar: float = 0.6,
) -> Array:
    """Block data [*shape, max(LOOKS)] (log ratios) with block SD ``sd`` and a true ``loss`` (ratio - 1).

    drift: log speed lost from leg to leg. ar: correlation of neighbouring legs.
    """
    blocks = max(LOOKS)
    legs = 4 * blocks
    wander = np.empty((*shape, legs))
    wander[..., 0] = rng.standard_normal(shape)
    for leg in range(1, legs):
        wander[..., leg] = ar * wander[..., leg - 1] + math.sqrt(1 - ar**2) * rng.standard_normal(shape)
    order = rng.choice([-1.0, 1.0], (*shape, blocks))  # +1: ABBA, -1: BAAB
    sign = np.array([-0.5, 0.5, 0.5, -0.5])
    # Half of the block's variance from the wandering speed, half from the legs themselves.
    noise = 0.5 * _scaled(wander, sign, sd) + math.sqrt(0.75) * _scaled(
        rng.standard_normal((*shape, legs)), sign, sd
    )
    times = (noise + drift * np.arange(legs)).reshape(*shape, blocks, 4)
    data: Array = order * (times @ sign) + math.log1p(loss)
    return data


def _scaled(legs: Array, sign: Array, sd: float) -> Array:
    """``legs`` made so large that their block datum has SD ``sd``."""
    blocks = legs.reshape(*legs.shape[:-1], -1, 4) @ sign
    scaled: Array = legs * (sd / blocks.std())
    return scaled


def simulate(data: Array, margin: float) -> Simulated:
    """The gate's own rules on ``data`` [gates, cells, blocks]: looks, split alpha, Holm over the cells."""
    level, limit = look_alpha(ALPHA, len(LOOKS)), np.asarray(math.log1p(margin))
    verdicts = np.zeros(data.shape[:2], dtype=np.int_)
    needed = np.full(data.shape[:2], max(LOOKS))
    p = np.ones(data.shape[:2])
    for look in LOOKS:
        open_ = verdicts == INCONCLUSIVE
        seen = data[..., :look]
        p = np.where(open_, p_worse(seen), p)
        found = interval(seen, level)
        now = decide(found.low, found.high, found.mean, holm(p), limit, level)
        needed = np.where(open_ & (now != INCONCLUSIVE), look, needed)
        verdicts = np.where(open_, now, verdicts)
    return Simulated(verdicts, needed)
