"""What a finished test means: passed, failed, or the infrastructure's fault; in data and in words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import cast

import pytest

from device_agents.errors import InfrastructureError
from device_agents.printable import printable
from harness.anywhere import AnyOf
from harness.checking import Cell, Unsupported
from harness.compare import CheckFailed
from harness.handover import Kind, Plan, Planned
from harness.marks import NoDevice
from harness.run import DeviceRun
from harness.suite import title_of
from reports.results import CheckResult, Divergence, Outcome, TopLogits


def is_infrastructure(error: BaseException) -> bool:
    return isinstance(error, InfrastructureError)


_CHOSEN = pytest.StashKey[str]()


def device_of(item: pytest.Function) -> str:
    """The device that a test of a cell or a leg is for; of one for any device the one that it ran on last."""
    place = place_of(item)
    return item.stash.get(_CHOSEN, place.devices[0]) if isinstance(place, AnyOf) else place


def place_of(item: pytest.Function) -> str | AnyOf:
    """As it was planned."""
    params = cast("dict[str, tuple[str | AnyOf, ...]]", item.callspec.params)
    return params["cell" if "cell" in params else "leg"][0]


def runs_on(item: pytest.Function, device: str) -> None:
    """Of a test for any device: it is this one now."""
    item.stash[_CHOSEN] = device


_RETRIES = pytest.StashKey[list[str]]()


def retries_of(item: pytest.Item) -> list[str]:
    """Why this check was tried again, one entry each time."""
    return item.stash.setdefault(_RETRIES, [])


def check_result(
    item: pytest.Function, call: pytest.CallInfo[None], run: DeviceRun, waited_s: float = 0.0
) -> CheckResult | None:
    """The stored row of a test that takes ``cell`` on a device; None for any other.

    waited_s: of the call's duration, seconds in which other devices had the machine.
    """
    if not on_a_device(item, "cell"):
        return None
    device, recipe = device_of(item), recipe_of(item)
    cell = item.funcargs.get("cell")
    tally = cell.take_tally() if isinstance(cell, Cell) else None
    error = call.excinfo.value if call.excinfo else None
    failure = error if isinstance(error, CheckFailed) else None
    return CheckResult(
        device=device,
        recipe=recipe,
        check=item.originalname,
        title=title_of(item.function),
        outcome=_outcome(error),
        seconds=max(0.0, call.duration - waited_s),
        programs=tally.programs if tally else 0,
        worst_error=tally.worst_error if tally and tally.programs else None,
        tolerance=tally.limit if tally else None,
        mean_kl=tally.kl / tally.rows if tally and tally.rows else None,
        kl_tolerance=cell.tolerance.mean_kl if isinstance(cell, Cell) and tally and tally.rows else None,
        message=str(error) if error else "",
        program=failure.program.to_json() if failure else "",
        replay=run.replay_command(device, recipe, _case_of(failure)) if failure else "",
        divergence=failure.divergence if failure else None,
        retries=tuple(retries_of(item)),
    )


def plan_of(items: Sequence[pytest.Item]) -> Plan:
    """What is about to be run."""
    functions = [item for item in items if isinstance(item, pytest.Function)]
    return Plan(
        tests=tuple(_planned(item) for item in items),
        not_run=tuple(
            nobody.not_run(item.originalname, title_of(item.function), fixture)
            for item in functions
            for fixture in ("cell", "leg")
            if (nobody := no_device(item, fixture)) is not None
        ),
    )


def _planned(item: pytest.Item) -> Planned:
    if not isinstance(item, pytest.Function):
        return Planned(item.nodeid, item.name, item.name, label(item), "other")
    checks, measures = "cell" in item.fixturenames, "leg" in item.fixturenames
    kind: Kind = "both" if checks and measures else "check" if checks else "measurement"
    fixture = "cell" if checks else "leg"
    device = recipe = ""
    anywhere: tuple[str, ...] = ()
    if on_a_device(item, fixture):
        place, recipe = place_of(item), recipe_of(item) if checks else ""
        device, anywhere = ("", place.devices) if isinstance(place, AnyOf) else (place, ())
    elif no_device(item, fixture) is None:
        kind = "other"
    check, title = item.originalname, title_of(item.function)
    return Planned(item.nodeid, check, title, label(item), kind, device, recipe, anywhere)


def lost_check(test: Planned, message: str, retries: Sequence[str]) -> CheckResult:
    """The row of a check whose process died with it."""
    return CheckResult(
        device=test.device,
        recipe=test.recipe,
        check=test.check,
        title=test.title,
        outcome="infrastructure",
        seconds=0.0,
        programs=0,
        worst_error=None,
        tolerance=None,
        message=message,
        retries=tuple(retries),
    )


def label(item: pytest.Item) -> str:
    """``host · hybrid · any chunking equals one shot``."""
    if not isinstance(item, pytest.Function):
        return item.name
    callspec = getattr(item, "callspec", None)
    what = item.originalname.removeprefix("test_").replace("_", " ")
    return f"{callspec.id} · {what}" if callspec else what


def no_device(item: pytest.Function, fixture: str) -> NoDevice | None:
    """Why no device may run this test; None when it has one."""
    callspec = getattr(item, "callspec", None)
    found = callspec.params.get(fixture) if callspec else None
    return found if isinstance(found, NoDevice) else None


def on_a_device(item: pytest.Item, fixture: str) -> bool:
    """Whether this test is one of a device's; it is not where no recipe or no device suits it."""
    callspec = getattr(item, "callspec", None)
    return callspec is not None and isinstance(callspec.params.get(fixture), tuple)


def describe_failure(item: pytest.Function, call: pytest.CallInfo[None], run: DeviceRun) -> str:
    """What the terminal shows; "" leaves pytest's traceback, for errors in the test itself."""
    assert call.excinfo is not None
    error = call.excinfo.value
    if isinstance(error, InfrastructureError):
        tried = [f"tried again after {reason}" for reason in retries_of(item)]
        said = f"{title_of(item.function)}: infrastructure error, not a test failure"
        return printable("\n".join([said, *tried, f"{type(error).__name__}: {error}"]))
    if not isinstance(error, CheckFailed):
        return ""
    device, recipe = device_of(item), recipe_of(item)
    lines = [f"{title_of(item.function)}: not so on {device} with {recipe}", str(error)]
    if error.divergence:
        lines += _top_logits(error.divergence)
    lines += ["minimal program:", textwrap.indent(error.program.to_json(), "  ")]
    lines += ["replay:", "  " + run.replay_command(device, recipe, _case_of(error))]
    return printable("\n".join(lines))


def _case_of(failure: CheckFailed) -> str:
    """What ``kvfarm replay`` takes; the program alone where a user's test compared by itself."""
    return failure.case.to_json() if failure.case else failure.program.to_json()


def recipe_of(item: pytest.Function) -> str:
    """As parametrized by harness.run_plugin."""
    return cast("tuple[object, str]", item.callspec.params["cell"])[1]


def _outcome(error: BaseException | None) -> Outcome:
    if error is None:
        return "passed"
    if isinstance(error, Unsupported):
        return "not_supported"
    if isinstance(error, pytest.skip.Exception):
        return "not_run"
    return "infrastructure" if is_infrastructure(error) else "failed"


def _top_logits(divergence: Divergence) -> list[str]:
    return [
        f"  reference top 5: {_pairs(divergence.expected)}",
        f"  found top 5:     {_pairs(divergence.found)}",
    ]


def _pairs(top: TopLogits) -> str:
    values = ("not finite" if value is None else f"{value:.4f}" for value in top.values)
    return "  ".join(f"{token}: {value}" for token, value in zip(top.tokens, values, strict=True))
