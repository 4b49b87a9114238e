"""The pytest plugin: ``pytest --devices=farm`` runs the suite on devices and writes the report.

Without ``--devices`` it does nothing at all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.outcomes import check_result, describe_failure, is_infrastructure
from harness.progress import Progress
from harness.run import DeviceRun, RunOptions

RUN = pytest.StashKey[DeviceRun]()
PROGRESS = pytest.StashKey[Progress]()
DEFAULT_RECIPES = "naive,static,hybrid,hybrid-fp16kv,hybrid-int8kv,int4"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvfarm", "KV cache checks and measurements on devices")
    add = group.addoption
    add("--devices", help="run on these: host, farm (all of farm.toml), or NAME,NAME")
    add("--model", type=Path, help="Hugging Face checkpoint folder to check and measure")
    add("--recipes", default=DEFAULT_RECIPES, help="recipes to check and measure (default: %(default)s)")
    add("--report", type=Path, metavar="DIR", help="write index.html, results.json and junit.xml here")
    add("--store", metavar="URL", help="result store (default: sqlite in .kvfarm/results.db)")
    add("--farm", type=Path, metavar="FILE", help="inventory (default: ./farm.toml, else this host)")
    add("--farm-address", metavar="ADDRESS", help="Ray cluster to join (default: start one here)")
    add("--examples", type=int, default=25, help="programs each property draws (default: %(default)s)")
    add(
        "--kvfarm-seed",
        type=int,
        metavar="N",
        help="seed of all programs (default: a new one, in the report)",
    )
    add("--prompt", type=int, default=128, help="prompt length to measure, tokens (default: %(default)s)")
    add("--new-tokens", type=int, default=64, help="tokens to generate when measuring (default: %(default)s)")
    add("--repeats", type=int, default=5, help="recorded repeats a leg (default: %(default)s)")
    add(
        "--measure",
        action="append",
        default=[],
        metavar="DIR=RECIPES",
        help="measure a further checkpoint with these recipes, unchecked; may be repeated",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "hybrid_only: a check that means something only for hybrid cache plans"
    )
    if config.getoption("devices") is None:
        return
    if getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("--devices runs every device from one process; leave out -n")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        # No tests named: the built-in suite, and whatever the project lists as its testpaths.
        ours = str(Path(__file__).parent / "suite")
        theirs = config.args if config.args_source is pytest.Config.ArgsSource.TESTPATHS else []
        config.args = [ours, *theirs]
    progress = Progress()
    try:
        config.stash[RUN] = DeviceRun(_options(config), progress.exporting)
    except Exception as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[PROGRESS] = progress


def _options(config: pytest.Config) -> RunOptions:
    from harness.store import DEFAULT_STORE

    get = config.getoption
    model: Path | None = get("model")
    if model is None:
        raise pytest.UsageError(
            "--devices needs --model DIR; make one with `kvfarm synth tiny-gemma3 -o DIR`"
        )
    return RunOptions(
        devices=get("devices"),
        model=_checkpoint(model),
        recipes=get("recipes"),
        store=get("store") or DEFAULT_STORE,
        report=get("report"),
        farm=get("farm"),
        farm_address=get("farm_address"),
        examples=get("examples"),
        seed=get("kvfarm_seed"),
        prompt=get("prompt"),
        new_tokens=get("new_tokens"),
        repeats=get("repeats"),
        measure=tuple(_measure(text) for text in get("measure")),
        command=(Path(sys.argv[0]).name, *config.invocation_params.args),
    )


def _measure(text: str) -> tuple[Path, str]:
    folder, equals, recipes = text.partition("=")
    if not equals:
        raise pytest.UsageError(
            f"--measure: sought DIR=RECIPES such as models/gemma-3-1b=int4, found {text!r}"
        )
    return _checkpoint(Path(folder)), recipes


def _checkpoint(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise pytest.UsageError(
            f"sought a checkpoint (config.json and *.safetensors) in {folder}, found none; "
            "make one with `kvfarm synth tiny-gemma3 -o DIR`"
        )
    return folder.resolve()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per device and recipe for ``cell``; one per device and measured model for ``leg``."""
    run = metafunc.config.stash.get(RUN, None)
    if run is None:
        return
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


@pytest.fixture(scope="session")
def device_run(request: pytest.FixtureRequest) -> DeviceRun:
    """The run that ``--devices`` started."""
    run = request.config.stash.get(RUN, None)
    if run is None:
        pytest.fail("this test needs devices: pytest --devices=host --model DIR", pytrace=False)
    return run


@pytest.fixture(scope="session")
def cell(request: pytest.FixtureRequest, device_run: DeviceRun) -> Iterator[Any]:
    """One device with one recipe (harness.checking.Cell)."""
    device, recipe = request.param
    device_run.identity(device)
    opened = device_run.cell(device, recipe)
    opened.on_program = request.config.stash[PROGRESS].program
    yield opened
    device_run.leave(device, recipe)


@pytest.fixture(scope="session")
def leg(request: pytest.FixtureRequest, device_run: DeviceRun) -> Any:
    """Call it to measure: one device, model and recipe in a fresh process; returns a LegResult."""
    return lambda: device_run.measure(*request.param)


def pytest_collection_finish(session: pytest.Session) -> None:
    run = session.config.stash.get(RUN, None)
    if run is None or session.config.option.collectonly:
        return
    names = [item.fixturenames for item in session.items if isinstance(item, pytest.Function)]
    run.planned_checks = sum("cell" in fixtures for fixtures in names)
    run.planned_legs = sum("leg" in fixtures for fixtures in names)
    run.store.begin_run(run.header())
    session.config.stash[PROGRESS].begin(session.config, len(session.items))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if progress := item.config.stash.get(PROGRESS, None):
        progress.test_started(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report: pytest.TestReport = yield
    run = item.config.stash.get(RUN, None)
    if run is None or not isinstance(item, pytest.Function):
        return report
    failed_early = call.when == "setup" and call.excinfo is not None
    if call.when != "call" and not failed_early:
        return report
    if call.excinfo is not None:
        report.longrepr = describe_failure(item, call, run) or report.longrepr
        if is_infrastructure(call.excinfo.value):
            report.when = (
                "setup"  # pytest calls what fails outside the test's own body an error, not a failure
            )
    result = check_result(item, call, run)
    if result is not None:
        run.keep(result)
    item.config.stash[PROGRESS].test_finished(item, report, result)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> Any:
    """Our own line a test replaces pytest's dots; what counts as what stays pytest's."""
    if config.stash.get(PROGRESS, None) is None or report.when != "call" or not report.passed:
        return None
    return "passed", "", "PASSED"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    run = session.config.stash.get(RUN, None)
    if run is None or session.config.option.collectonly or not run.planned_checks + run.planned_legs:
        return
    complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    session.config.stash[PROGRESS].finished(run.finish(complete), run.options.report)
    if exitstatus == pytest.ExitCode.OK and not session.config.stash[PROGRESS].ok:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if progress := config.stash.get(PROGRESS, None):
        progress.summary(terminalreporter)


def pytest_unconfigure(config: pytest.Config) -> None:
    if run := config.stash.get(RUN, None):
        run.close()
