"""Virtual phones that a run asks for where none can be: their tests are skipped, in CI it is an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from device_agents.bundle.lock import parse_abi
from device_agents.deadline import Deadline
from device_agents.virtual.errors import VirtualPhoneUnavailable
from device_agents.virtual.possible import why_not
from device_agents.virtual.rootfs import native_abi
from harness.discovery import PassedOver
from harness.errors import InventoryError
from harness.inventory import LOCAL_LAB, Inventory

_ASK_S = 60.0
_NOT_CI = ("", "0", "false", "no")


def impossible(
    names: Sequence[str], known: Inventory, cache: Path, ask: Callable[[str], str] | None = None
) -> tuple[PassedOver, ...]:
    """Those of ``names`` that are virtual phones of this machine, where it can have none; and why.

    ask: the reason for an ABI, "" where it is possible; the default asks this machine.

    Raises:
        InventoryError: there is one, and this is a CI, where a skipped phone would look like a tested one.
    """
    asked: dict[str, str] = {}
    found = []
    for name in names:
        entry = known.device(name)
        if not entry.virtual or entry.lab != LOCAL_LAB:
            continue
        abi = entry.options.get("abi", "")
        if abi not in asked:
            asked[abi] = (ask or (lambda abi: _reason(abi, cache)))(abi)
        if asked[abi]:
            found.append(PassedOver(name, f"no virtual phones on this machine: {asked[abi]}"))
    if found and os.environ.get("CI", "").lower() not in _NOT_CI:
        lines = "".join(f"\n  {each.name}: {each.reason}" for each in found)
        raise InventoryError(
            "virtual phones are asked for and not possible here; CI is set, so that is an error and their "
            f"tests are not skipped:{lines}"
        )
    return tuple(found)


def _reason(abi: str, cache: Path) -> str:
    try:
        return why_not(parse_abi(abi) if abi else native_abi(), cache, Deadline(_ASK_S))
    except VirtualPhoneUnavailable as error:
        return str(error)
