"""What an ablation was, as plain data: how its legs, which are ordinary legs of the run, belong together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AblationStep:
    """recipe: the name of the legs' recipe. what: the change against the step before, in words."""

    key: str
    title: str
    what: str
    recipe: str


@dataclass(frozen=True)
class AblationInfo:
    """steps: from the naive baseline to the full engine, all with the same weights.

    unquantised: the last step with unquantised weights, None if it was left out. weights: of ``steps``.
    weights_bytes: of the matrices and tables, in the artifact of the last step.
    head_share: of the multiply-adds of one prompt token, those of the head.
    planned: legs.
    """

    steps: tuple[AblationStep, ...]
    unquantised: AblationStep | None
    weights: str
    weights_bytes: int
    head_share: float
    rounds: int
    planned: int
