"""What pytest does around the tests of a run over devices: parametrize, record, report."""

from __future__ import annotations

from typing import Any, cast

import pytest

from device_agents.errors import InfrastructureError
from harness.checking import Cell
from harness.outcomes import check_result, describe_failure, device_of, is_infrastructure, retries_of
from harness.progress import Progress, label
from harness.run import DeviceRun, RunOptions


class RunPlugin:
    """Registered by ``harness.plugin`` when ``--devices`` is given."""

    def __init__(self, config: pytest.Config, options: RunOptions) -> None:
        self.progress = Progress(config)
        progress = self.progress
        self.run = DeviceRun(options, progress.step, progress.program, progress.retried)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per device and recipe for ``cell``; per device, model and recipe for ``leg``."""
        run = self.run
        if "cell" in metafunc.fixturenames:
            hybrid_only = metafunc.definition.get_closest_marker("hybrid_only")
            pairs = [
                (device, recipe.name)
                for device in run.devices
                for recipe in run.recipes.values()
                if not hybrid_only or recipe.export.cache.kind == "hybrid"
            ]
            ids = [f"{device}-{recipe}" for device, recipe in pairs]
            metafunc.parametrize("cell", pairs, ids=ids, indirect=True, scope="session")
        if "leg" in metafunc.fixturenames:
            triples = [(device, model, recipe) for device in run.devices for model, recipe in run.measured]
            ids = [f"{device}-{model.name}-{recipe.name}" for device, model, recipe in triples]
            metafunc.parametrize("leg", triples, ids=ids, indirect=True, scope="session")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            return
        names = [item.fixturenames for item in session.items if isinstance(item, pytest.Function)]
        self.run.begin(
            planned_checks=sum("cell" in fixtures for fixtures in names),
            planned_legs=sum("leg" in fixtures for fixtures in names),
        )
        self.progress.begin(len(session.items))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.progress.test_started(item)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """A test of a cell that infrastructure stops is run again; see harness.recovery.

        One that measures as well is not: its legs, tried again for themselves, are in the store by then.
        """
        if "cell" not in pyfuncitem.fixturenames or "leg" in pyfuncitem.fixturenames:
            return None
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        device, cell = device_of(pyfuncitem), cast("Cell", pyfuncitem.funcargs["cell"])

        def work() -> None:
            cell.take_tally()
            self.run.identity(device)
            pyfuncitem.obj(**arguments)

        self.run.recovery.attempt(device, work, retries_of(pyfuncitem))
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report: pytest.TestReport = yield
        failed_early = call.when == "setup" and call.excinfo is not None
        if not isinstance(item, pytest.Function) or (call.when != "call" and not failed_early):
            return report
        if call.excinfo is not None:
            report.longrepr = describe_failure(item, call, self.run) or report.longrepr
            if is_infrastructure(call.excinfo.value):
                # What fails outside the test's own body is an error to pytest, not a failure.
                report.when = "setup"
        result = check_result(item, call, self.run)
        if result is not None:
            self.run.keep(result)
        error = call.excinfo.value if call.excinfo else None
        if "leg" in item.fixturenames and isinstance(error, InfrastructureError):
            self.run.keep_lost_leg(device_of(item), label(item), error)
        self.progress.test_finished(item, report, result)
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Our own line a test replaces pytest's dot; what counts as what stays pytest's."""
        return ("passed", "", "PASSED") if report.when == "call" and report.passed else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not self.run.begun:
            return
        complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        green = self.progress.finished(self.run.finish(complete), self.run.options.report)
        if exitstatus == pytest.ExitCode.OK and not green:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        self.progress.summary(terminalreporter)

    def pytest_unconfigure(self) -> None:
        self.run.close()
