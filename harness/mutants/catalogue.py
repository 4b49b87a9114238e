"""All mutants, and why some numbers of the catalogue have none."""

from __future__ import annotations

from harness.mutants import batch, lifecycle, numerics, position, ring, window
from harness.mutants.mutant import Mutant

CATALOGUE = range(1, 57)

MUTANTS: tuple[Mutant, ...] = tuple(
    sorted(
        (
            *window.MUTANTS,
            *ring.MUTANTS,
            *position.MUTANTS,
            *batch.MUTANTS,
            *lifecycle.MUTANTS,
            *numerics.MUTANTS,
        ),
        key=lambda mutant: mutant.number,
    )
)

CANNOT_EXIST: dict[int, tuple[str, str]] = {
    10: (
        "VeloxQuant-MLX#370",
        "kept keys lie in order of position and carry their own rotation, and the operator masks by count: "
        "there is no mask made of positions to take a shortcut past",
    ),
    53: (
        "ll#23044",
        "a wrong kernel of one CPU cannot be injected by altering the engine; it is what running the suite "
        "on each device is for",
    ),
}
