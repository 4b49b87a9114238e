"""What pytest does around the tests of a run over devices: parametrize, record, report."""

from __future__ import annotations

from typing import Any

import pytest

from harness.checking import applies
from harness.outcomes import check_result, describe_failure, is_infrastructure
from harness.progress import Progress
from harness.run import DeviceRun, RunOptions


class RunPlugin:
    """Registered by ``harness.plugin`` when ``--devices`` is given."""

    def __init__(self, config: pytest.Config, options: RunOptions) -> None:
        self.progress = Progress(config)
        self.run = DeviceRun(options, on_step=self.progress.step, on_program=self.progress.program)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per device and recipe for ``cell``; per device, model and recipe for ``leg``."""
        run = self.run
        if "cell" in metafunc.fixturenames:
            marks = {mark.name for mark in metafunc.definition.iter_markers()}
            pairs = [
                (device, recipe.name)
                for device in run.devices
                for recipe in run.recipes.values()
                if applies(marks, recipe)
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
