"""Open the farm, run a plan, close the farm: what ``kvfarm gate``, ``calibrate`` and a night do alike."""

from __future__ import annotations

from harness.farm import Farm
from harness.gate.plan import Plan
from harness.gate.session import GateSession, Watcher
from harness.inventory import Inventory
from harness.store.protocol import Store
from reports.results import RunResults


def run_plan(
    plan: Plan, inventory: Inventory, farm_address: str | None, store: Store, watcher: Watcher
) -> RunResults:
    """The plan's run, whole; goes on with one that was killed.

    Raises:
        InfrastructureError: the farm cannot be opened. StoreError.
    """
    with Farm(inventory, plan.devices, farm_address) as farm:
        return GateSession(plan, farm, store, watcher).run()
