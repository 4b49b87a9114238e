"""The seam: what a mutant is, and how it gets into the engine and out again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

RIGHT = "the right engine"


@dataclass(frozen=True)
class Patch:
    """Puts ``wrap(original)`` in the place of ``owner.name``, a function or method of the engine."""

    owner: Any
    name: str
    wrap: Callable[[Any], Any]


@dataclass(frozen=True)
class Mutant:
    """One bug.

    number: in the catalogue (shared reference, "Bug catalogue"). source: where it was found upstream.
    what: how the engine is altered. recipe, model: in which it can show.
    """

    name: str
    number: int
    source: str
    what: str
    patches: tuple[Patch, ...]
    recipe: str = "hybrid,slack=2"
    model: str = "w5"

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, whatever is exported, opened and run has the bug; afterwards nothing is left of it."""
        with contextlib.ExitStack() as stack:
            for patch in self.patches:
                broken = patch.wrap(getattr(patch.owner, patch.name))
                stack.enter_context(mock.patch.object(patch.owner, patch.name, broken))
            yield
