"""The pytest plugin: ``pytest --devices=farm`` runs the suite on devices and writes the report.

Loaded by every pytest on a machine with kvfarm, so it imports nothing heavy until ``--devices``
is given; what a run then does is in ``harness.run_plugin``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.leasing import Terms
    from harness.measuring import Shape
    from harness.run import DeviceRun
    from harness.run_options import RunOptions
    from harness.run_plugin import DeviceTests, Reporting

PLUGIN = "kvfarm-run"
DEFAULT_RECIPES = "naive,static,hybrid,hybrid-fp16kv,hybrid-int8kv,int4"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvfarm", "KV cache checks and measurements on devices")
    add = group.addoption
    add(
        "--devices",
        help="run on these: host, farm (all of farm.toml), adb (phones that adb knows), virtual:N (phones "
        "started here), simulated:N (no engine, recorded latencies), NAME,NAME, or a condition: "
        "'abi==arm64-v8a and ram>=8GiB'; several work at the same time, -n says how many at most",
    )
    add("--model", type=Path, help="Hugging Face checkpoint folder to check and measure")
    add("--recipes", help=f"recipes to check and measure (default: {DEFAULT_RECIPES}; with --onnx: none)")
    add(
        "--onnx",
        action="append",
        default=[],
        metavar="FILE",
        help="check and measure this ONNX export of the checkpoint, of whatever exporter (see kvfarm "
        "inspect); may be repeated; short for the recipe onnx,model=FILE, with --recipes=onnx,threads=2 for "
        "onnx,model=FILE,threads=2",
    )
    add("--report", type=Path, metavar="DIR", help="write index.html, results.json and junit.xml here")
    add("--store", metavar="URL", help="result store (default: sqlite in .kvfarm/results.db)")
    add(
        "--tag",
        action="append",
        default=[],
        metavar="NAME",
        help="keep the run under this name, such as the release it is of; may be repeated",
    )
    add("--kvfarm-resume", default="", metavar="RUN", help="go on with this run, as `kvfarm resume` does it")
    add("--farm", type=Path, metavar="FILE", help="inventory (default: ./farm.toml, else this host)")
    add("--farm-address", metavar="ADDRESS", help="Ray cluster to join (default: start one here)")
    add("--examples", type=int, default=25, help="programs each property draws (default: %(default)s)")
    add(
        "--kvfarm-seed",
        type=int,
        metavar="N",
        help="seed of all programs (default: a new one, in the report)",
    )
    add(
        "--prompt",
        default="128",
        metavar="N,N",
        help="prompt lengths to measure, tokens (default: %(default)s)",
    )
    add(
        "--new-tokens",
        default="64",
        metavar="N,N",
        help="tokens to generate when measuring (default: %(default)s)",
    )
    add(
        "--depth",
        default="0",
        metavar="N,N",
        help="tokens already in the cache when the prompt comes; their time is not measured (default: "
        "%(default)s)",
    )
    add(
        "--sustained",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="also measure back to back until the speed settles, at most so long (default: not)",
    )
    add("--repeats", type=int, default=5, help="recorded repeats a leg (default: %(default)s)")
    add(
        "--energy",
        action="store_true",
        help="also measure energy for each token: minutes a leg, and phones must be unplugged",
    )
    add(
        "--retries",
        type=int,
        default=2,
        help="further tries of what infrastructure stopped (default: %(default)s)",
    )
    add(
        "--recover-within",
        type=float,
        default=180.0,
        metavar="SECONDS",
        help="a device that answers no more for so long is quarantined (default: %(default)g)",
    )
    add(
        "--golden-job",
        choices=("phones", "all", "none"),
        default="phones",
        help="whose health a tiny program with a known answer tells, before work begins and after an "
        "infrastructure failure (default: %(default)s)",
    )
    add(
        "--reboots",
        type=int,
        default=0,
        metavar="N",
        help="how often a day a phone that does not answer or computes wrongly may be rebooted, by all runs "
        "together (default: %(default)s)",
    )
    add("--user", metavar="NAME", help="in whose name devices are leased (default: who runs this)")
    add(
        "--priority",
        type=int,
        default=0,
        metavar="N",
        help="in line for devices; higher is first (default: %(default)s)",
    )
    add(
        "--wait",
        default="1h",
        metavar="TIME",
        help="how long to stand in line for devices that others have: 90s, 10m, 1h (default: %(default)s)",
    )
    add(
        "--lease-timeout",
        default="30s",
        metavar="TIME",
        help="devices are free again so long after this run fell silent (default: %(default)s)",
    )
    add(
        "--kvfarm-log",
        type=Path,
        metavar="FILE",
        help="append what happens to this file, a JSON object a line, with run, device and lease",
    )
    add(
        "--measure",
        action="append",
        default=[],
        metavar="DIR=RECIPES[@DEVICES]",
        help="measure a further checkpoint with these recipes, unchecked, on all devices or these; repeat",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "hybrid_only: a check that means something only for hybrid cache plans",
        "quantized_cache_only: a check that means something only for int8 and int4 caches",
        "device(condition, any=False): run this test only on devices that satisfy the condition, such as "
        "'abi==arm64-v8a and ram>=8GiB'; any=True: once, on whichever of them is free",
    ):
        config.addinivalue_line("markers", marker)
    if config.getoption("devices") is None:
        return
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        # No tests named: the built-in suite, and whatever the project lists as its testpaths.
        ours = str(Path(__file__).parent / "suite")
        theirs = config.args if config.args_source is pytest.Config.ArgsSource.TESTPATHS else []
        config.args = [ours, *theirs]
    from device_agents import logs
    from device_agents.errors import InfrastructureError
    from harness import termination
    from harness.errors import HarnessError
    from kvengine.errors import KvEngineError

    termination.end_in_order(config)
    try:
        # What workers and agents start from the environment; pytest itself shows what is logged meanwhile.
        logs.set_up(config.getoption("kvfarm_log"), terminal=False)
        options = _options(config)
        config.pluginmanager.register(_plugin(config, options), PLUGIN)
    except (HarnessError, KvEngineError, InfrastructureError) as error:
        raise pytest.UsageError(str(error)) from error


def _plugin(config: pytest.Config, options: RunOptions) -> DeviceTests | Reporting:
    """The whole run; or a worker's part of it, or the controller's."""
    from harness import parallel
    from harness.progress import Progress
    from harness.run import DeviceRun
    from harness.run_plugin import RunPlugin

    if parallel.is_worker(config):
        return parallel.worker(config, options)
    progress = Progress(config)
    run = DeviceRun(options, progress.step, progress.program, progress.retried, on_wait=progress.waits)
    processes = parallel.processes(config, run)
    if processes > 1:
        return parallel.controller(config, run, progress, processes)
    parallel.stay_here(config)
    return RunPlugin(run, progress)


def _options(config: pytest.Config) -> RunOptions:
    from harness.recovery import RecoveryPolicy
    from harness.run_options import RunOptions
    from harness.store import DEFAULT_STORE
    from harness.tags import tags_of

    get = config.getoption
    model: Path | None = get("model")
    if model is None:
        raise pytest.UsageError(
            "--devices needs --model DIR; make one with `kvfarm synth tiny-gemma3 -o DIR`"
        )
    return RunOptions(
        devices=get("devices"),
        model=_checkpoint(model),
        recipes=_recipes(get("recipes"), get("onnx")),
        store=get("store") or str(DEFAULT_STORE),
        report=get("report"),
        farm=get("farm"),
        farm_address=get("farm_address"),
        examples=get("examples"),
        seed=get("kvfarm_seed"),
        shapes=_shapes(config),
        repeats=get("repeats"),
        recovery=RecoveryPolicy(get("retries"), get("recover_within")),
        measure=tuple(_measure(text) for text in get("measure")),
        energy=get("energy"),
        terms=_terms(config),
        golden=get("golden_job"),
        reboots=get("reboots"),
        command=(Path(sys.argv[0]).name, *config.invocation_params.args),
        tags=tags_of(get("tag")),
        arguments=tuple(map(str, config.invocation_params.args)),
        resume=get("kvfarm_resume"),
    )


def _recipes(named: str | None, models: list[str]) -> str:
    """As one text; commas and semicolons part recipes, so a path must have none."""
    from harness.recipes import with_models

    for path in models:
        if {",", ";"} & set(path):
            raise pytest.UsageError(f"--onnx {path}: sought a path without commas and semicolons; rename it")
    if named is None:
        named = "" if models else DEFAULT_RECIPES
    return with_models(named, models)


def _terms(config: pytest.Config) -> Terms:
    from harness.errors import HarnessError
    from harness.leasing import Terms, duration, user_name

    get = config.getoption
    try:
        wait_s, beat_s = duration(get("wait")), duration(get("lease_timeout"))
    except HarnessError as error:
        raise pytest.UsageError(f"--wait, --lease-timeout: {error}") from error
    return Terms(get("user") or user_name(), get("priority"), wait_s, beat_s)


def _shapes(config: pytest.Config) -> tuple[Shape, ...]:
    from harness.measuring import lengths, shapes

    def given(option: str, least: int = 1) -> tuple[int, ...]:
        try:
            return lengths(config.getoption(option), least)
        except ValueError as error:
            raise pytest.UsageError(f"{option}: {error}") from error

    sustained: float = config.getoption("sustained")
    if sustained < 0:
        raise pytest.UsageError(f"--sustained: sought 0 or more seconds, found {sustained:g}")
    return shapes(given("--prompt"), given("--new-tokens"), given("--depth", 0), sustained)


def _measure(text: str) -> tuple[Path, str, tuple[str, ...]]:
    folder, equals, rest = text.partition("=")
    recipes, _, names = rest.partition("@")
    if not equals:
        raise pytest.UsageError(
            f"--measure: sought DIR=RECIPES[@DEVICES] such as models/gemma-3-1b=int4@host, found {text!r}"
        )
    return _checkpoint(Path(folder)), recipes, tuple(filter(None, names.split(",")))


def _checkpoint(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise pytest.UsageError(
            f"sought a checkpoint (config.json and *.safetensors) in {folder}, found none; "
            "make one with `kvfarm synth tiny-gemma3 -o DIR`"
        )
    return folder.resolve()


@pytest.fixture(scope="session")
def device_run(request: pytest.FixtureRequest) -> DeviceRun:
    """The run that ``--devices`` started."""
    plugin: DeviceTests | None = request.config.pluginmanager.get_plugin(PLUGIN)
    if plugin is None:
        pytest.fail("this test needs devices: pytest --devices=host --model DIR", pytrace=False)
    return plugin.run


@pytest.fixture(scope="session")
def cell(request: pytest.FixtureRequest, device_run: DeviceRun) -> Iterator[Any]:
    """One device with one recipe (harness.checking.Cell)."""
    from harness.anywhere import AnyOf

    device, recipe = request.param
    if isinstance(device, AnyOf):
        yield None  # made when it is known where the test runs: harness.run_plugin
        return
    yield device_run.cell(device, recipe)
    device_run.leave(device, recipe)


@pytest.fixture(scope="session")
def leg(request: pytest.FixtureRequest, device_run: DeviceRun) -> Any:
    """Call it to measure one device, model and recipe in a fresh process; returns a LegResult."""
    return lambda: device_run.measure(*request.param)
