"""A run whose devices work at the same time: pytest-xdist, all tests of one device in one worker.

The controller owns Ray, the references, the run in the store, the lines and the report. A worker
joins that Ray, leases the device whose tests it runs, and stores each result before it reports it:
what was stored survives both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from device_agents.errors import InfrastructureError
from device_agents.virtual.namespaces import die_with_parent
from harness.errors import StoreError
from harness.handover import KEY, Board, Handover, Planned, RunFolder, Teller
from harness.inventory import LOCAL_LAB
from harness.outcomes import device_of, lost_check, plan_of, retries_of
from harness.progress import Progress
from harness.run import DeviceRun
from harness.run_options import RunOptions
from harness.run_plugin import DeviceTests, Reporting
from harness.scheduling import Job, LongestFirst, Scheduler
from harness.scheduling.history import History


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def processes(config: pytest.Config, run: DeviceRun) -> int:
    """How many devices work at the same time; below 2 the run stays in this process.

    What ``-n`` says, else all of them, but of those that compute on this machine's CPU only as many as
    it has cores.
    """
    option = config.option
    if len(run.devices) < 2 or option.collectonly or option.usepdb:
        return 0
    if not config.pluginmanager.hasplugin("xdist"):  # -p no:xdist
        return 0
    wanted: int | None = option.numprocesses
    if wanted is None:
        entries = [run.inventory.device(name) for name in run.devices]
        here = sum(entry.shares_cpu and entry.lab == LOCAL_LAB for entry in entries)
        wanted = min(here, len(os.sched_getaffinity(0))) + len(entries) - here
    return min(wanted, len(run.devices))


def stay_here(config: pytest.Config) -> None:
    """No workers, whatever -n says."""
    if config.pluginmanager.hasplugin("xdist"):
        config.option.dist, config.option.tx, config.option.numprocesses = "no", [], None


def controller(config: pytest.Config, run: DeviceRun, progress: Progress, processes: int) -> ControllerPlugin:
    """Has xdist start ``processes`` workers. Raises InfrastructureError: Ray does not start."""
    config.option.numprocesses = processes
    config.option.tx = ["popen"] * processes
    config.option.dist = "loadgroup"
    # Devices come in an order of their own, the slow ones first.
    config.option.loadscopereorder = False
    folder = RunFolder.new()
    try:
        return ControllerPlugin(run, progress, folder)
    except BaseException:
        run.close()
        folder.remove()
        raise


def worker(config: pytest.Config, options: RunOptions) -> WorkerPlugin:
    """This process's part of the run that it was handed."""
    handover = Handover.from_json(config.workerinput[KEY])  # type: ignore[attr-defined]
    _end_with(handover.controller)
    folder = RunFolder(Path(handover.folder))
    progress = Progress(config, Teller(folder.path))
    run = DeviceRun(
        options, progress.step, progress.program, progress.retried, handover, on_wait=progress.waits
    )
    return WorkerPlugin(run, progress, folder)


def _end_with(controller: int) -> None:
    """A worker whose controller was killed would finish its test first, which may take an hour."""
    die_with_parent()  # the controller starts workers in its main thread
    if os.getppid() != controller:
        raise InfrastructureError("the controller of this run has ended")


class WorkerPlugin(DeviceTests):
    """Runs the tests that the controller sends, device by device."""

    def __init__(self, run: DeviceRun, progress: Progress, folder: RunFolder) -> None:
        super().__init__(run, progress)
        self._folder = folder
        self._plan: dict[str, Planned] = {}

    @pytest.hookimpl(tryfirst=True)  # before xdist tells the controller that it may read the plan
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        plan = plan_of(session.items)
        self._plan = {test.nodeid: test for test in plan.tests}
        self._folder.write_plan(plan)
        self._leave_out_what_is_done(session, plan)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Any:
        if not self.run.begun:
            self.run.resume()
        retries_of(item).extend(self._folder.crashes(item.nodeid))
        found = yield
        planned = self._plan[item.nodeid]
        # Of a test for any device: the one that it ran on.
        device = device_of(item) if planned.anywhere and isinstance(item, pytest.Function) else planned.device
        if device and (nextitem is None or not _goes_on(self._plan[nextitem.nodeid], device)):
            self.progress.idle()
            self.run.give_back(device)
        return found

    def pytest_sessionfinish(self) -> None:
        with suppress(StoreError):
            self.run.store.drain()  # else the controller takes it over
        # Not at unconfigure: from the end of the session on the controller may stop Ray.
        self.run.close()

    def pytest_unconfigure(self) -> None:
        self.run.close()


class ControllerPlugin(Reporting):
    """Starts what the workers share, shows what they do, and ends what they leave."""

    def __init__(self, run: DeviceRun, progress: Progress, folder: RunFolder) -> None:
        super().__init__(run, progress)
        self._folder = folder
        self._tests: dict[str, Planned] = {}
        self._crashes: dict[str, list[str]] = {}
        self._handover = run.hand_over(folder)
        self._board = Board(folder.path, progress.devices) if progress.live else None
        self._history = History.of(run.store, run.options.model.name)

    # -- workers ----------------------------------------------------------------------------------

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput[KEY] = self._handover.to_json()

    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        if self.run.begun:
            return
        plan = self._folder.plan()
        self._tests = {test.nodeid: test for test in plan.tests}
        self.run.begin(plan.checks, plan.legs, plan.not_run)
        self.progress.begin(len(ids))

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> DeviceScheduling:
        return DeviceScheduling(config, log, self)

    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        """A worker that died has its device still on lease, and the next one wants it."""
        if error:
            self.run.farm.give_back_for(node.gateway._rinfo().pid)

    # -- crashes ----------------------------------------------------------------------------------

    def device_of(self, nodeid: str) -> str:
        return self._test(nodeid).device

    def expected_s(self, nodeid: str) -> float:
        """By history."""
        return self._history.seconds(self._test(nodeid))

    def may_run_again(self, nodeid: str) -> bool:
        """Of a test whose worker died. One that measures is not repeated: its legs may be stored."""
        tries = len(self._crashes.get(nodeid, ()))
        return self._test(nodeid).kind == "check" and tries < self.run.options.recovery.retries

    def crashed(self, nodeid: str) -> None:
        self._crashes.setdefault(nodeid, []).append("the worker process of this device died")
        self._folder.write_crashes(self._crashes)

    @pytest.hookimpl(tryfirst=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport, sched: Any) -> None:
        test = self._test(crashitem)
        if crashitem in sched.again:
            report.outcome = "rerun"  # type: ignore[assignment]
            self.progress.tried_again(f"{self._crashes[crashitem][-1]}: {test.label}")
            return
        report.when = "setup"
        report.longrepr = f"{test.title}: infrastructure error, not a test failure\n{report.longrepr}"
        tries = self._crashes.get(crashitem, [])
        if test.kind in ("check", "both") and test.device:
            self.run.keep(lost_check(test, str(report.longrepr), tries))
        elif test.anywhere:
            self.run.keep_lost(f"{test.label}: its worker process died")
        if test.kind in ("measurement", "both"):
            self.run.keep_lost(f"{test.device}: {test.label}: its worker process died")
        self.progress.describe_lost(report, test.label)

    def _test(self, nodeid: str) -> Planned:
        return self._tests[nodeid]

    # -- the end ----------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        if str(report.outcome) == "rerun":
            return "rerun", "", "RERUN"
        return super().pytest_report_teststatus(report)

    def pytest_unconfigure(self) -> None:
        if self._board is not None:
            self._board.close()
        super().pytest_unconfigure()
        self._folder.remove()


def _goes_on(test: Planned, device: str) -> bool:
    return test.device == device or device in test.anywhere


class DeviceScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """All tests of one device go to one worker, those of any or of no device wherever there is room.

    What is expected to take longest is begun first, so that no long one is left over at the end.
    """

    def __init__(self, config: pytest.Config, log: Any, run: ControllerPlugin) -> None:
        super().__init__(config, log)
        self._run = run
        self.again: set[str] = set()  # crashed, and to be run again

    def _split_scope(self, nodeid: str) -> str:
        return self._run.device_of(nodeid) or nodeid

    def _assign_work_unit(self, node: Any) -> None:
        """As the base, which takes the first."""
        queue: Scheduler = LongestFirst()
        for scope, unit in self.workqueue.items():
            queue.add(Job(scope, sum(self._run.expected_s(id_) for id_, done in unit.items() if not done)))
        queue.join(node.gateway.id)
        if (job := queue.take(node.gateway.id)) is not None:
            self.workqueue.move_to_end(job.id, last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node: Any) -> None:
        """As the base, which stumbles over the second of two replaced workers that has not yet collected."""
        if node in self.registered_collections:
            super()._reschedule(node)

    def remove_node(self, node: Any) -> str | None:
        """As the base, which would begin a test whose worker died again without end."""
        units = self.assigned_work[node]
        crashed = next(_pending(units), None)
        if crashed is not None:
            again = self._run.may_run_again(crashed)
            self._run.crashed(crashed)
            self.again = {crashed} if again else set()
            units[self._split_scope(crashed)][crashed] = not again
        for scope in [scope for scope in units if all(units[scope].values())]:
            del units[scope]  # the base would hand it to a worker, which then waits for ever
        super().remove_node(node)
        return crashed


def _pending(units: dict[str, dict[str, bool]]) -> Iterator[str]:
    return (nodeid for unit in units.values() for nodeid, done in unit.items() if not done)
