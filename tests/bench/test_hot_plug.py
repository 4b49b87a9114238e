"""The periods that add up to how soon a phone is noticed stay within what docs/farm.md promises."""

from __future__ import annotations

from bench.hot_plug import BOUND_S
from device_agents.adb import plugged
from harness.cli import watching
from harness.hosting import records


def test_a_phone_is_noticed_within_the_bound_even_by_an_adb_server_that_had_gone() -> None:
    assert plugged._AGAIN_S + records.PUBLISH_S + watching._LOOK_S <= BOUND_S
