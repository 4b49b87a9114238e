"""``pytest --devices=…`` as a user runs it: real Ray, real runner processes, real report files."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from device_agents.deadline import Deadline
from harness.artifacts import artifact_for
from harness.errors import StoreError
from harness.recipes import parse_recipe
from harness.store import open_store
from harness.synth import synth
from kvengine.export import export

SECONDS = 180
SMALL = ("--prompt=8", "--new-tokens=4", "--repeats=2", "--kvfarm-seed=7")
CHECKS_OF_HYBRID, CHECKS_OF_STATIC = 19, 18
A_FEW = "p01 or p02 or p09"  # of the checks: enough for a run that something happens to


class Run:
    """One folder with a checkpoint, in which pytest is run as a child process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = synth("tiny-gemma3", folder / "tiny-gemma3")

    def command(self, *arguments: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "pytest",
            f"--model={self.model}",
            "--report=report",
            *SMALL,
            *arguments,
        ]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A run of a user's own, not one inside this pytest.
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        )

    def pytest(self, *arguments: str) -> tuple[int, str]:
        with self.start(*arguments) as process:
            output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output

    @property
    def results(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "report" / "results.json").read_text())
        return loaded

    @property
    def junit(self) -> ET.Element:
        return ET.parse(self.folder / "report" / "junit.xml").getroot()


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[Run]:
    yield Run(folder)
    left = [p.cmdline() for p in psutil.process_iter() if str(folder) in " ".join(_cmdline(p))]
    assert left == [], "the run left processes behind"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with leaving_nothing(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def from_the_package(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run of three checks of the installed suite says, on a model without a hybrid cache."""
    with leaving_nothing(tmp_path_factory.mktemp("package")) as run:
        checks = ("-k", "p02 or p08 or p09", "--examples=1")
        code, output = run.pytest("--pyargs", "harness.suite", "--devices=host", "--recipes=naive", *checks)
    assert code == 0, output
    return output


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_a_right_engine_is_green_and_reported(run: Run) -> None:
    tags = ("--tag=v1.2", "--tag=stable")
    code, output = run.pytest("--devices=farm", "--recipes=hybrid,static", "--examples=3", *tags)
    assert code == 0, output
    assert f"PASSED: {CHECKS_OF_HYBRID + CHECKS_OF_STATIC}/37 checks passed; 2/2 measurements" in output
    results = run.results
    assert results["planned_checks"] == len(results["checks"]) == CHECKS_OF_HYBRID + CHECKS_OF_STATIC
    assert results["planned_legs"] == len(results["legs"]) == 2
    assert results["seed"] == 7
    assert results["finished_at"] is not None
    assert results["tags"] == ["v1.2", "stable"]
    leg = results["legs"][0]
    assert len(leg["samples"]) == 2
    assert all(sample["ttft_ms"] > 0 and len(sample["itl_ms"]) == 3 for sample in leg["samples"])
    assert leg["nodes_by_provider"]["CPUExecutionProvider"] > 0
    assert leg["vitals_before"]["mem_available_bytes"] > 0
    assert "<html" in (run.folder / "report" / "index.html").read_text()
    assert run.junit.findall(".//failure") == run.junit.findall(".//error") == []


def test_a_wrong_engine_is_red_with_a_program_that_replays(run: Run) -> None:
    recipe = parse_recipe("hybrid")
    right = artifact_for(run.model, recipe.export, run.folder / ".kvfarm" / "artifacts")
    wrong = synth("tiny-gemma3", run.folder / "wrong" / "tiny-gemma3")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"sliding_window": 6}))
    export(wrong, right.folder, recipe.export)  # the engine now looks one token too far back

    code, output = run.pytest("--devices=host", "--recipes=hybrid", "--examples=20", "-k", "p01 or p09")
    assert code == 1, output
    assert "FAILED: " in output
    failed = {check["check"]: check for check in run.results["checks"] if check["outcome"] == "failed"}
    check = failed["test_p01_every_step_equals_the_reference"]
    assert check["divergence"]["position"] >= 5, "the window is 5: earlier tokens see no difference"
    assert len(check["divergence"]["expected"]["tokens"]) == 5
    assert "first differing step" in output
    assert check["program"] in output
    assert len(run.junit.findall(".//failure")) == len(failed)
    assert run.junit.findall(".//error") == []

    replay = shlex.split(check["replay"])
    found = subprocess.run(
        [str(Path(sys.executable).with_name("kvfarm")), *replay[1:]],
        cwd=run.folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert found.returncode == 1, found.stderr
    assert "first differing step" in found.stdout + found.stderr


def test_a_check_whose_runner_was_killed_is_tried_again_and_says_so(run: Run) -> None:
    process = run.start("--devices=host", "--recipes=hybrid", "--examples=40", "-k", A_FEW)
    try:
        _kill_one_runner(process.pid)
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, output
    checks = run.results["checks"]
    assert [check["outcome"] for check in checks] == ["passed"] * 3
    (hit,) = [check for check in checks if check["retries"]]
    assert "RunnerDied" in hit["retries"][0]
    assert hit["programs"] >= 40  # of the try that counts, not of what was cut short before it
    assert "tried again after RunnerDied" in output
    assert hit["retries"][0][:40] in (run.folder / "report" / "index.html").read_text()


def test_without_retries_a_killed_runner_is_an_infrastructure_error_and_the_run_goes_on(run: Run) -> None:
    process = run.start("--devices=host", "--recipes=hybrid", "--examples=40", "-k", A_FEW, "--retries=0")
    try:
        _kill_one_runner(process.pid)
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 1, output
    outcomes = [check["outcome"] for check in run.results["checks"]]
    assert outcomes.count("infrastructure") == 1, output
    assert "failed" not in outcomes
    assert outcomes.count("passed") == 2
    (lost,) = [check for check in run.results["checks"] if check["outcome"] == "infrastructure"]
    assert "runner" in lost["message"]
    assert len(run.junit.findall(".//error")) == 1
    assert run.junit.findall(".//failure") == []
    assert "infrastructure error, not a test failure" in output


def test_sigterm_is_an_interruption_and_no_failure(run: Run) -> None:
    process = run.start("--devices=host", "--recipes=static", "--examples=40", "-k", "p0")
    try:
        _await_a_result(run)
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    assert "INTERNALERROR" not in output
    results = run.results
    outcomes = [check["outcome"] for check in results["checks"]]
    assert set(outcomes) == {"passed"}, output
    assert len(outcomes) < results["planned_checks"], "it was to be stopped before its end"
    assert results["finished_at"] is None
    assert "index.html" in output
    assert not [line for line in map(_cmdline, filter(_lives, family)) if "device_agents.runner" in line]


def _await_a_result(run: Run) -> None:
    """Until the store has the result of a check."""
    deadline, path = Deadline(SECONDS), run.folder / ".kvfarm" / "results.db"
    while True:
        if path.exists():
            with suppress(StoreError), open_store(path) as store:
                if store.results(store.latest()).checks:
                    return
        deadline.check("the first result")
        time.sleep(0.1)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _kill_one_runner(pid: int) -> None:
    """SIGKILL the first runner that works for the pytest process ``pid``."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for child in psutil.Process(pid).children(recursive=True):
            if "device_agents.runner" in _cmdline(child) and child.cpu_times().user > 0.4:
                child.kill()
                return
        time.sleep(0.05)
    pytest.fail("no runner appeared")


def test_the_suite_runs_from_the_installed_package(from_the_package: str) -> None:
    assert "PASSED: " in from_the_package


def test_the_readme_example_runs_as_it_stands(run: Run) -> None:
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (run.folder / "test_mine.py").write_text(example)
    code, output = run.pytest("test_mine.py", "--devices=host", "--recipes=hybrid", "--examples=4")
    assert code == 0, output
    assert "PASSED: 1/1 checks passed" in output


def test_bad_input_is_one_clear_line(run: Run) -> None:
    """As a process ends by it; what else is bad input: tests/harness/test_usage.py."""
    code, output = run.pytest("--devices=pixel8")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "pixel8" in output
    assert "Traceback" not in output
    assert not (run.folder / "report").exists()


def test_without_devices_the_plugin_is_silent(run: Run) -> None:
    (run.folder / "test_theirs.py").write_text("def test_theirs(): pass\n")
    code, output = run.pytest("test_theirs.py")
    assert code == 0, output
    assert "kvfarm-run" not in output
    assert not (run.folder / "report").exists()


def test_a_grid_of_workloads_and_a_sustained_run(run: Run) -> None:
    grid = ("--prompt=8,32", "--new-tokens=4", "--depth=0,16", "--sustained=3")
    code, output = run.pytest("--devices=host", "--recipes=hybrid", "-k", "latency", *grid)
    assert code == 0, output
    legs = run.results["legs"]
    assert [(leg["prompt_tokens"], leg["depth"], leg["workload"]) for leg in legs] == [
        (8, 0, "prompt 8 + 4 new"),
        (8, 16, "prompt 8 + 4 new at depth 16"),
        (32, 0, "prompt 32 + 4 new"),
        (32, 16, "prompt 32 + 4 new at depth 16"),
        (8, 0, "sustained, prompt 8 + 4 new"),
    ]
    assert all(leg["memory_pass"] and leg["peak_rss_bytes"] > 0 for leg in legs)
    assert legs[3]["kv_bytes"] > legs[2]["kv_bytes"]
    sustained = legs[-1]["sustained"]
    assert 2 <= len(sustained["tokens_per_s"]) == len(sustained["seconds"])
    assert sustained["seconds"][-1] >= 3
    page = (run.folder / "report" / "index.html").read_text()
    assert 'id="c0-prompt"' in page
    assert 'id="c0-sustained"' in page


def test_a_further_checkpoint_is_measured_where_it_is_asked_for(run: Run) -> None:
    (run.folder / "farm.toml").write_text("[devices.one]\n[devices.two]\n")
    further = "--measure=tiny-gemma3=static@two"
    code, output = run.pytest("--devices=one,two", "--recipes=naive", "-n0", "-k", "latency", further)
    assert code == 0, output
    found = [(leg["device"], leg["recipe"]) for leg in run.results["legs"]]
    assert sorted(found) == [("one", "naive"), ("two", "naive"), ("two", "static")]


def test_a_check_for_hybrid_caches_is_not_planned_without_one(from_the_package: str) -> None:
    assert "PASSED: 2/2 checks passed" in from_the_package
