"""Names that people give to stored runs, such as the release they are of, and what such a name means."""

from __future__ import annotations

import re
from collections.abc import Iterable

from harness.errors import HarnessError
from harness.provenance import commit_of_tag
from harness.recipes import PRESETS
from harness.store.protocol import Store

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+/-]{0,99}")  # a REF goes on with ``:`` or ``,``


def tags_of(names: Iterable[str]) -> tuple[str, ...]:
    """``names``, each once, in order.

    Raises:
        HarnessError: one that no REF could name.
    """
    found = tuple(dict.fromkeys(names))
    for name in found:
        if not _TAG.fullmatch(name):
            raise HarnessError(
                f"sought a tag of at most 100 letters, digits and ._+/- such as v1.2, found {name!r}"
            )
        if name in PRESETS:
            raise HarnessError(f"sought a tag, found the recipe {name!r}; a REF would mean the recipe")
    return found


def find_run(name: str, store: Store) -> str | None:
    """The id of the run that ``name`` means: a run's id, a tag, or git's tag of the commit that was run.

    Raises:
        StoreError.
    """
    return store.find(name) or (store.find(name, commit) if (commit := commit_of_tag(name)) else None)
