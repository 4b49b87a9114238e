"""What pytest does around the tests of a run over devices: parametrize, record, report.

``RunPlugin`` does all of it where one process does; ``harness.parallel`` has the parts for several.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

import pytest

from device_agents.errors import InfrastructureError
from harness import resuming, termination
from harness.anywhere import AnyOf, run_anywhere
from harness.checking import Cell, Unsupported, applies
from harness.errors import ClusterLost, InventoryError, StoreError
from harness.handover import Plan
from harness.marks import MARKER, DeviceMarks, NoDevice, for_any
from harness.outcomes import (
    check_result,
    describe_failure,
    device_of,
    is_infrastructure,
    label,
    place_of,
    plan_of,
    recipe_of,
    retries_of,
    runs_on,
)
from harness.progress import Progress
from harness.run import DeviceRun
from reports.results import NotRun

NOT_SUPPORTED = "not supported"


class DeviceTests:
    """Plans the tests of a run, runs them and keeps what they find."""

    def __init__(self, run: DeviceRun, progress: Progress) -> None:
        self.run = run
        self.progress = progress
        self._marks = DeviceMarks(run)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per device and recipe for ``cell``; per device, model, recipe and workload for ``leg``.

        A test whose marker no device satisfies is planned once, and skipped with the reason; so is one on
        each device that cannot be on this machine.
        """
        run = self.run
        ours = {"cell", "leg"} & set(metafunc.fixturenames)
        if not ours:
            return
        devices = self._devices(metafunc)
        if isinstance(devices, NoDevice):
            for fixture in sorted(ours):
                metafunc.parametrize(fixture, [_skipped(devices)], indirect=True, scope="session")
            return
        marked = any(metafunc.definition.iter_markers(MARKER))
        # Its marker says which devices a test is for, and those that cannot be are not asked.
        nowhere = [_skipped(NoDevice(each.name, (each,)), each.name) for each in run.impossible if not marked]
        if "cell" in metafunc.fixturenames:
            marks = {mark.name for mark in metafunc.definition.iter_markers()}
            pairs: list[tuple[str | AnyOf, str]] = [
                (device, recipe.name)
                for device in devices
                for recipe in run.recipes_of(device)
                if applies(marks, recipe)
            ]
            if for_any(metafunc.definition.iter_markers(MARKER)):
                pairs = _one_of_each(pairs)
            cells = [
                pytest.param((place, recipe), id=f"{'any' if isinstance(place, AnyOf) else place}-{recipe}")
                for place, recipe in pairs
            ]
            cells += nowhere if pairs else []
            metafunc.parametrize("cell", cells, indirect=True, scope="session")
        if "leg" in metafunc.fixturenames:
            legs = [
                (device, model, recipe, shape)
                for device in devices
                for model, recipe in run.measured_on(device)
                for shape in run.options.shapes
            ]
            several = len(run.options.shapes) > 1
            planned = [
                pytest.param(
                    (device, model, recipe, shape),
                    id=f"{device}-{model.name}-{recipe.name}" + (f"-{shape.key}" if several else ""),
                )
                for device, model, recipe, shape in legs
            ]
            # With a cell as well, that says it already.
            more = nowhere if legs and "cell" not in ours else []
            metafunc.parametrize("leg", [*planned, *more], indirect=True, scope="session")

    def _devices(self, metafunc: pytest.Metafunc) -> tuple[str, ...] | NoDevice:
        definition = metafunc.definition
        if for_any(definition.iter_markers(MARKER)) and "leg" in metafunc.fixturenames:
            raise pytest.Collector.CollectError(
                f"{definition.nodeid}: any=True is for tests that take `cell` alone; a measurement is of one "
                "certain device"
            )
        try:
            return self._marks.devices(definition.iter_markers(MARKER), definition.nodeid)
        except InventoryError as error:
            raise pytest.Collector.CollectError(str(error)) from error

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """A check that means nothing for any of the run's recipes, and so has no cell, is not planned."""
        empty = [item for item in items if _has_no_cell(item)]
        if empty:
            config.hook.pytest_deselected(items=empty)
            items[:] = [item for item in items if item not in empty]

    def _leave_out_what_is_done(self, session: pytest.Session, plan: Plan) -> None:
        """Checks of an earlier process of this run have their results; legs are looked for one by one."""
        done = [test.nodeid for test in plan.tests if resuming.is_done(test, self.run.done)]
        if done:
            session.config.hook.pytest_deselected(items=[i for i in session.items if i.nodeid in done])
            session.items[:] = [item for item in session.items if item.nodeid not in done]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.progress.test_started(item)
        self.run.test_begins(item.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """A test of a cell that infrastructure stops is run again; see harness.recovery.

        One that measures as well is not: its legs, tried again for themselves, are in the store by then.
        """
        self.run.take_waited()
        if "cell" not in pyfuncitem.fixturenames or "leg" in pyfuncitem.fixturenames:
            return None
        place = place_of(pyfuncitem)

        def work(device: str) -> None:
            cell = cast("Cell", pyfuncitem.funcargs["cell"])
            cell.take_tally()
            self.run.until_fit(device)
            with self.run.working(device):
                self.run.ready(device)
                pyfuncitem.obj(
                    **{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
                )

        def on_device(device: str) -> None:
            runs_on(pyfuncitem, device)
            pyfuncitem.funcargs["cell"] = self.run.cell(device, recipe_of(pyfuncitem))

        if isinstance(place, AnyOf):
            run_anywhere(self.run, place, work, retries_of(pyfuncitem), on_device)
        else:
            self.run.recovery.attempt(place, lambda: work(place), retries_of(pyfuncitem))
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        if call.excinfo is not None and termination.is_behind(call.excinfo.value):
            raise KeyboardInterrupt(f"no failure: {item.name} was interrupted") from call.excinfo.value
        report: pytest.TestReport = yield
        failed_early = call.when == "setup" and call.excinfo is not None
        if not isinstance(item, pytest.Function) or (call.when != "call" and not failed_early):
            return report
        if call.excinfo is not None:
            report.longrepr = describe_failure(item, call, self.run) or report.longrepr
            if is_infrastructure(call.excinfo.value):
                # What fails outside the test's own body is an error to pytest, not a failure.
                report.when = "setup"
        waited_s = self.run.take_waited() if call.when == "call" else 0.0
        result = check_result(item, call, self.run, waited_s)
        error = call.excinfo.value if call.excinfo else None
        if isinstance(error, ClusterLost):  # no result: whoever goes on with the run begins with this test
            item.session.shouldstop = str(error)
            return report
        if result is not None:
            self.run.keep(result, call.start, call.stop)
        if isinstance(error, Unsupported):
            report.outcome = "skipped"
            report.longrepr = str(item.path), (item.location[1] or 0) + 1, f"{NOT_SUPPORTED}: {error}"
        if "leg" in item.fixturenames and isinstance(error, InfrastructureError):
            self.run.keep_lost_leg(device_of(item), label(item), error)
        self.progress.describe(item, report, result, waited_s)
        return report


class Reporting:
    """What the user sees of a run: a line a test, the summary and the report."""

    def __init__(self, run: DeviceRun, progress: Progress) -> None:
        self.run = run
        self.progress = progress

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.progress.test_finished(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Our own line a test replaces pytest's dot; what counts as what stays pytest's."""
        if report.skipped and isinstance(report.longrepr, tuple) and NOT_SUPPORTED in report.longrepr[2]:
            return NOT_SUPPORTED, "", "NOT SUPPORTED"
        if report.skipped and not hasattr(report, "wasxfail"):
            return "skipped", "", "SKIPPED"
        return ("passed", "", "PASSED") if report.when == "call" and report.passed else None

    # Innermost: all workers have ended by then, and the summary is still to come.
    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Any:
        yield
        if not self.run.begun:
            return
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.run.done:
            session.exitstatus = exitstatus = pytest.ExitCode.OK  # all had been done before
        complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        try:
            results = self.run.finish(complete)
        except StoreError as error:
            self.progress.unfinished(self.run.run_id, str(error))
            session.exitstatus = pytest.ExitCode.INTERRUPTED
            return
        green = self.progress.finished(results, self.run.options.report, self.run.trend)
        if exitstatus == pytest.ExitCode.OK and not green:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        self.progress.summary(terminalreporter)

        def why(each: NotRun) -> tuple[str, tuple[str, ...]]:
            return each.condition, each.reasons

        for (condition, reasons), tests in groupby(sorted(self.run.not_run, key=why), why):
            titles = [each.title for each in tests]
            what = titles[0] if len(titles) == 1 else f"{len(titles)} tests"
            terminalreporter.write_line(f"not run: {what}: no device for {condition!r}")
            for reason in reasons:
                terminalreporter.write_line(f"  {reason}")

    def pytest_report_header(self) -> list[str]:
        lines = [f"kvfarm devices: {', '.join(self.run.devices) or 'none'}"]
        if self.run.options.resume:
            lines.append(f"goes on with run {self.run.run_id}: {len(self.run.done)} checks are done")
        return lines + [f"  not chosen: {each.name}: {each.reason}" for each in self.run.passed_over]

    def pytest_unconfigure(self) -> None:
        self.run.close()


class RunPlugin(DeviceTests, Reporting):
    """A run in one process."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            return
        plan = plan_of(session.items)
        self.run.begin(plan.checks, plan.legs, plan.not_run)
        self._leave_out_what_is_done(session, plan)
        self.progress.begin(len(session.items))


def _skipped(nobody: NoDevice, name: str = "no-device") -> Any:
    """What a test is parametrized with where it cannot run."""
    return pytest.param(nobody, marks=pytest.mark.skip(reason=nobody.sentence), id=name)


def _one_of_each(pairs: Sequence[tuple[str | AnyOf, str]]) -> list[tuple[str | AnyOf, str]]:
    """Each recipe once, for any of the devices that it is for."""
    devices: dict[str, list[str]] = {}
    for device, recipe in pairs:
        devices.setdefault(recipe, []).append(str(device))
    return [(AnyOf(tuple(names)), recipe) for recipe, names in devices.items()]


def _has_no_cell(item: pytest.Item) -> bool:
    """Whether pytest was given no parameters for its cell; it then makes one test with a placeholder."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or "cell" not in callspec.params:
        return False
    return not isinstance(callspec.params["cell"], tuple | NoDevice)
