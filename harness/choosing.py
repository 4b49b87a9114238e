"""From ``--devices`` to devices: names and pools, phones that adb knows, or a condition on all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from device_agents.api import DeviceIdentity
from device_agents.lab_types import DeviceStatus
from harness import discovery, inventory
from harness.discovery import Found, PassedOver
from harness.errors import InventoryError
from harness.inventory import ADB, ALL, DEFAULT, FILE, DeviceEntry, Inventory
from harness.selection import Condition, Known, Value, is_expression, parse
from kvengine.providers import PROVIDERS

Find = Callable[[Inventory, bool], Found]


@dataclass(frozen=True)
class Selection:
    """What ``--devices`` says.

    inventory: with the phones that were found. names: the devices; with a ``condition``, those that
    have to be asked first, see ``choose``. passed_over: what was sought and cannot be had.
    """

    text: str
    inventory: Inventory
    names: tuple[str, ...]
    condition: Condition | None = None
    passed_over: tuple[PassedOver, ...] = ()

    def choose(self, statuses: Sequence[DeviceStatus]) -> Choice:
        """Those of the devices that were asked that satisfy the condition and are free; where none is, those
        that others have, to wait for them; never none.

        Raises:
            InventoryError: none; says of each device why.
        """
        choice = self.judge(statuses)
        if not choice.names:
            free = [dataclasses.replace(status, lease=None) for status in statuses]
            choice = self.judge(free)
        if not choice.names:
            raise none_matches(self.text, choice.passed_over)
        return choice

    def judge(self, statuses: Sequence[DeviceStatus]) -> Choice:
        """As ``choose``, maybe with no name in it."""
        chosen, passed = [], list(self.passed_over)
        for status in statuses:
            reason = self._against(status)
            if reason:
                passed.append(PassedOver(status.name, reason))
            else:
                chosen.append(status.name)
        return Choice(tuple(chosen), tuple(passed))

    def _against(self, status: DeviceStatus) -> str:
        if status.identity is None:
            return f"does not answer: {status.error}"
        if status.quarantined:
            return f"quarantined {status.quarantined}"
        if status.lease is not None:
            return f"leased to {status.lease.holder}"
        if self.condition is None:
            return ""
        known = what_is_known(status.name, self.inventory, status.identity)
        return "" if self.condition.decide(known) else "; ".join(self.condition.why(known, True))


@dataclass(frozen=True)
class Choice:
    """names: chosen. passed_over: every other device, and why."""

    names: tuple[str, ...]
    passed_over: tuple[PassedOver, ...]


def inventory_for(farm_file: Path | None, farm_address: str | None) -> Inventory:
    """The inventory of ``farm_file`` or ./farm.toml; with neither, what the hosts of the cluster offer.

    Raises:
        InventoryError: it cannot be used, or offers nothing. InfrastructureError: no cluster at the address.
    """
    if farm_file is None and farm_address is not None and not Path(FILE).is_file():
        from harness.hosting.records import offered_at  # which needs Ray

        offered = offered_at(farm_address)
        if offered is not None:
            return offered
    return inventory.load(farm_file)


def read(text: str, known: Inventory, find: Find = discovery.find) -> Selection:
    """What ``text`` means, before any device is asked.

    Raises:
        InventoryError: an unknown name; a condition that cannot be read, or that by farm.toml alone
        no device can satisfy; no phone for ``adb``.
    """
    condition = parse(text) if is_expression(text) else None
    words = {part.strip() for part in text.split(",")}
    wanted = ADB in words and condition is None
    whole, passed = known, list[PassedOver]()
    if wanted or (known is DEFAULT and (condition is not None or ALL in words)):
        found = find(known, wanted)
        whole = dataclasses.replace(
            known, devices={**known.devices, **found.phones}, pools={**known.pools, ADB: tuple(found.phones)}
        )
        passed += found.unready
    if condition is None:
        if words == {ADB} and not whole.pools[ADB]:
            raise none_matches(text, passed or [PassedOver(ADB, "knows no phone; plug one in")])
        return Selection(text, whole, inventory.select(text, whole), None, tuple(passed))
    names = []
    for name in _candidates(condition, whole):
        facts = what_is_known(name, whole)
        if condition.decide(facts) is False:
            passed.append(PassedOver(name, "; ".join(condition.why(facts, True))))
        else:
            names.append(name)
    if not names:
        raise none_matches(text, passed)
    return Selection(text, whole, tuple(names), condition, tuple(passed))


def what_is_known(name: str, known: Inventory, identity: DeviceIdentity | None = None) -> Known:
    """A device's values for a condition; without ``identity``, what the inventory says by itself."""
    entry = known.device(name)
    pools = [pool for pool in known.pools if name in inventory.members(pool, known)]
    facts: dict[str, Value | None] = {
        "name": name,
        "kind": entry.kind,
        "lab": entry.lab,
        "owner": known.owner(name) or None,
        "pool": tuple(pools),
        **_by_inventory(entry),
    }
    if identity is None:
        return facts
    short = {provider.onnxruntime_name: name for name, provider in PROVIDERS.items()}
    return facts | {
        "model": identity.model or None,
        "soc": identity.soc or None,
        "abi": identity.abi or None,
        "os": identity.os or None,
        "api": identity.api_level,
        "build": identity.build or None,
        "serial": identity.serial or None,
        "cores": identity.cores or None,
        "ram": identity.ram_bytes or None,
        "simulated": bool(identity.simulated),
        "provider": tuple(short.get(provider, provider) for provider in identity.providers),
        **{name: identity.runtime.get(name) for name in ("python", "numpy", "onnxruntime", "kvengine")},
    }


def none_matches(text: str, passed: Sequence[PassedOver]) -> InventoryError:
    """The error for a selection that chooses nothing: the answer to "why no device"."""
    lines = "".join(f"\n  {each.name}: {each.reason}" for each in passed)
    return InventoryError(f"no device for {text!r}:{lines}")


def _by_inventory(entry: DeviceEntry) -> dict[str, Value | None]:
    """What is certain of a device that was not asked."""
    if entry.kind == "host":
        return {"simulated": False, "api": None, "serial": None}
    if entry.options.get("virtual") != "true":
        return {}
    return {"simulated": True} | ({"abi": entry.options["abi"]} if "abi" in entry.options else {})


def _candidates(condition: Condition, known: Inventory) -> list[str]:
    """Every listed device; and where pools are asked for, the virtual phones that only pools name."""
    names = dict.fromkeys(known.devices)
    if "pool" in condition.fields:
        for pool in known.pools:
            names.update(dict.fromkeys(inventory.members(pool, known)))
    return list(names)
