from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.browser import Chromium, chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    """One for all pages that a module opens."""
    with chromium() as started:
        yield started
