"""Is the candidate right? What the store knows of the correctness suite, for the gate's page to show.

It informs: wrong answers are a night's or `kvfarm run`'s verdict, and the gate compares tokens itself.
"""

from __future__ import annotations

from harness.gate.plan import Plan
from harness.store.protocol import Store
from reports.gate_results import CheckedInfo
from reports.results import CheckResult


def known_checks(store: Store, plan: Plan) -> tuple[CheckedInfo, ...]:
    """The newest checks of the candidate's recipe on each of the plan's devices; run_id "" for none."""
    return tuple(_of_device(store, device, plan) for device in plan.devices)


def _of_device(store: Store, device: str, plan: Plan) -> CheckedInfo:
    recipe = plan.candidate.side.recipe
    found = store.checks(device=device, recipe=recipe, model=plan.candidate.model)
    if found is None:
        return CheckedInfo(device, recipe)
    meant = [check for check in found.checks if check.outcome != "not_supported"]
    failed = tuple(check.title for check in meant if check.outcome != "passed")
    shares = [share for check in meant if (share := _share(check)) is not None]
    return CheckedInfo(
        device,
        recipe,
        found.run_id,
        found.at,
        found.commit,
        passed=len(meant) - len(failed),
        total=len(meant),
        failed=failed,
        worst_share=max(shares, default=None),
    )


def _share(check: CheckResult) -> float | None:
    """The worst error of a passed check as a share of its tolerance; None where it is bit by bit."""
    if check.outcome != "passed" or check.worst_error is None or not check.tolerance:
        return None
    return check.worst_error / check.tolerance
