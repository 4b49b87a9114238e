"""A seed means the same programs in every process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants


@contextmanager
def same_everywhere() -> Iterator[None]:
    """While the body runs, what Hypothesis draws depends on the seed alone.

    It mixes in constants from the source of whatever modules of the user's are loaded just then (since
    6.131, hypothesis.internal.constants_ast), and those differ between the workers of a run and the one
    process of the next. There is no setting against it.
    """
    none = Constants()
    before = providers._get_local_constants
    providers.CONSTANTS_CACHE.cache.clear()
    providers._get_local_constants = lambda: none
    try:
        yield
    finally:
        providers._get_local_constants = before
        providers.CONSTANTS_CACHE.cache.clear()
