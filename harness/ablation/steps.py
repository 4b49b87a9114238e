"""The ladder from the naive decoder to the full engine, each rung one choice of the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from kvengine.recipe import Weights
from reports.ablation_results import AblationStep

UNQUANTISED: Weights = "float32"


@dataclass(frozen=True)
class Ladder:
    """rungs: from the naive baseline to the full engine, all with the same weights.

    unquantised: the full engine with unquantised weights, to show what quantising them is worth; None where
    the rungs have those already.
    """

    rungs: tuple[AblationStep, ...]
    unquantised: AblationStep | None

    @property
    def all(self) -> tuple[AblationStep, ...]:
        return (*self.rungs, self.unquantised) if self.unquantised else self.rungs


def ladder(weights: Weights, with_unquantised: bool = True) -> Ladder:
    """Every rung keeps what the rung before it turned on."""

    def rung(key: str, title: str, what: str, recipe: str, choices: str = "") -> AblationStep:
        return AblationStep(key, title, what, f"{recipe},weights={weights}{choices}")

    late = ",threads=ort"
    rungs = (
        rung(
            "naive",
            "Naive",
            "growing cache, session.run with numpy arrays, logits of every token, onnxruntime's threads",
            "naive",
        ),
        rung(
            "static",
            "Static buffers",
            "K and V of the full context, fed and returned",
            "naive",
            ",cache=static",
        ),
        rung(
            "binding",
            "IO binding",
            "present bound onto past: written in place",
            "naive",
            ",cache=static,io-binding=on",
        ),
        rung(
            "logits", "Last-position logits", "the head runs on one row; argmax in the graph", "static", late
        ),
        rung("windowed", "Windowed layers", "local layers hold their window only", "hybrid", late),
        rung("float16", "float16 cache", "half the bytes of K and V", "hybrid-fp16kv", late),
        rung("int8", "int8 cache", "a quarter of them, calibrated scales", "hybrid-int8kv", late),
        rung("threads", "Threads", "as many as fast cores this process may use", "hybrid-int8kv"),
    )
    if not with_unquantised or weights == UNQUANTISED:
        return Ladder(rungs, None)
    return Ladder(
        rungs,
        AblationStep(
            "weights",
            f"{weights} weights",
            f"the full engine, {UNQUANTISED} against {weights} weights",
            f"hybrid-int8kv,weights={UNQUANTISED}",
        ),
    )


def order(count: int, turn: int) -> list[int]:
    """Indices of ``count`` steps in round ``turn``: every second one backwards, each pair rotated.

    Over a pair of rounds every step has the same mean place, so that a steady drift of the machine
    cancels (ABBA); the rotation keeps the same steps from always being first and last.
    """
    start = (turn // 2) * max(1, count // 3)
    forward = [(start + index) % count for index in range(count)]
    return forward[::-1] if turn % 2 else forward
