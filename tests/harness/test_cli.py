"""kvfarm on the command line: contracts for scripts, plain errors, and help for everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from harness import cli
from harness.store import open_store
from kvengine.plan import CachePlan
from kvengine.recipe import SessionRecipe
from reports.results import RunResults

MIB = 1 << 20


class Line:
    """Runs one command line and keeps what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> int:
        self.code = cli.run([str(a) for a in arguments])
        self.stdout, self.stderr = self.capsys.readouterr()
        return self.code

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        """With --json: stdout must be one JSON object and nothing else."""
        command, *rest = arguments
        self(command, "--json", *rest)
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found


@pytest.fixture
def kvfarm(capsys: pytest.CaptureFixture[str]) -> Line:
    return Line(capsys)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    assert cli.run(["synth", "tiny-gemma3", "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    assert cli.run(["export", str(checkpoint), "-o", str(folder)]) == 0
    return folder


COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def test_the_commands_of_the_contract_are_there() -> None:
    contract = {"synth", "export", "memory", "generate", "devices", "run", "report"}
    assert contract < set(COMMANDS)
    for name in contract:
        assert "--json" in [opt for p in COMMANDS[name].params for opt in p.opts], name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_option_has_help(name: str) -> None:
    assert COMMANDS[name].help
    assert [p.name for p in COMMANDS[name].params if p.name != "help" and not p.help] == []


def test_synth(kvfarm: Line, tmp_path: Path) -> None:
    said = kvfarm.json("synth", "tiny-gemma3", "-o", tmp_path / "t", "--seed", "3")
    assert kvfarm.code == 0
    assert said["checkpoint"] == str(tmp_path / "t")
    assert said["bytes"] == sum(f.stat().st_size for f in (tmp_path / "t").iterdir())


def test_export_takes_every_choice_of_an_export_recipe(
    kvfarm: Line, checkpoint: Path, tmp_path: Path
) -> None:
    said = kvfarm.json(
        *("export", checkpoint, "-o", tmp_path / "a", "--weights", "int4", "--block-size", "64"),
        *("--cache", "hybrid", "--cache-dtype", "float16", "--slack", "3", "--activations", "float32"),
    )
    assert kvfarm.code == 0
    assert said["recipe"] == {
        "weights": "int4",
        "block_size": 64,
        "activations": "float32",
        "cache": {"kind": "hybrid", "dtype": "float16", "slack": 3},
    }
    assert said["bytes"] == sum(f.stat().st_size for f in (tmp_path / "a").glob("model.onnx*"))


@pytest.mark.parametrize("weights", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("cache", ["static", "hybrid"])
def test_every_weights_and_cache_is_accepted(
    kvfarm: Line, checkpoint: Path, tmp_path: Path, weights: str, cache: str
) -> None:
    arguments = ("export", checkpoint, "-o", tmp_path / "a", "--weights", weights, "--cache", cache)
    assert kvfarm.json(*arguments)["recipe"]["weights"] == weights


def test_memory_of_gemma_3_1b(kvfarm: Line) -> None:
    plans = kvfarm.json("memory", "gemma-3-1b", "--context", "1024", "--slack", "0")["plans"]
    by_name = {plan["name"]: plan["mib"] for plan in plans}
    # 26 layers, 1 KV head, head_dim 256; 22 local layers with a window of 512, 4 global ones.
    assert by_name == {
        "static, float32, MHA: 4 KV heads": 208,
        "static, float32": 52,
        "static, float16": 26,
        "static, int8": 13,
        "static, int4": 6.5,
        "hybrid, float32, slack 0": 22 * 1 + 4 * 2,
        "hybrid, float16, slack 0": 15,
        "hybrid, int8, slack 0": 7.5,
        "hybrid, int4, slack 0": 3.75,
    }
    assert [plan["bytes"] for plan in plans] == [int(plan["mib"] * MIB) for plan in plans]


def test_memory_of_a_checkpoint_equals_its_presets(kvfarm: Line, checkpoint: Path) -> None:
    assert kvfarm.json("memory", checkpoint)["plans"] == kvfarm.json("memory", "tiny-gemma3")["plans"]


def test_memory_of_an_artifact_is_what_generating_allocates(kvfarm: Line, artifact: Path) -> None:
    said = kvfarm.json("memory", artifact, "--context", "100")["artifact"]
    measured = kvfarm.json("generate", artifact, "--tokens", "5,6,7", "--context", "100")
    assert said["bytes"] == measured["kv_bytes"] > 0


def test_memory_for_a_person(kvfarm: Line) -> None:
    assert kvfarm("memory", "gemma-3-1b") == 0
    assert "54,525,952" in kvfarm.stdout


def test_generate(kvfarm: Line, artifact: Path) -> None:
    from kvengine.engine import LocalEngine
    from kvengine.program import Workload

    said = kvfarm.json("generate", artifact, "--tokens", "5,6,7", "--max-new-tokens", "9", "--threads", "1")
    assert kvfarm.code == 0
    engine = LocalEngine.open(artifact, SessionRecipe(threads=1))
    (sample,) = engine.run_workload(Workload((5, 6, 7), 9, repeats=1, warmup=0)).samples
    assert tuple(said["tokens"]) == sample.tokens
    assert len(said["itl_ms"]) == 8
    assert said["ttft_ms"] > 0
    assert said["peak_rss_bytes"] > MIB
    assert said["kv_bytes"] == _cache_bytes(artifact, 3 + 9)
    assert said["threads"] == 1
    assert sum(said["nodes_by_provider"].values()) > 0


def _cache_bytes(artifact: Path, context: int) -> int:
    from kvengine.artifact import Artifact

    manifest = Artifact.open(artifact).manifest
    return CachePlan("hybrid", "float32", manifest.recipe.cache.slack).total_bytes(manifest.spec, context)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("generate", "nowhere", "--tokens", "5"), "ArtifactError", "sought artifact.json in nowhere"),
        (("generate", "{artifact}", "--tokens", "5,six"), "InvalidToken", "'5,six'"),
        (("generate", "{artifact}", "--tokens", "99999"), "InvalidToken", "found 99999"),
        (("generate", "{artifact}", "--tokens", ""), "EmptyPrompt", ""),
        (("generate", "{artifact}", "--tokens", "5", "--provider", "cuda"), "ProviderUnavailable", "cuda"),
        (("generate", "{artifact}", "--tokens", "5", "--flag", "FAST"), "RecipeError", "'FAST'"),
        (
            ("generate", "{artifact}", "--tokens", "5,6", "--context", "9", "--max-new-tokens", "99"),
            "ContextOverflow",
            "9",
        ),
        (("generate", "{artifact}"), "UsageError", "--tokens"),
        (("memory", "gemma-4"), "CheckpointError", "presets are tiny-gemma3, tiny-llama"),
        (("memory", "gemma-3-1b", "--context", "0"), "UsageError", "--context"),
        (("synth", "gemma-4", "-o", "x"), "SynthError", "gemma-3-1b"),
        (("export", "nowhere", "-o", "x"), "CheckpointError", "nowhere"),
        (("export", "nowhere", "-o", "x", "--cache", "static", "--slack", "4"), "RecipeError", "static"),
        (("export", "nowhere", "-o", "x", "--block-size", "48"), "RecipeError", "32, 64, 128"),
        (("report", "--store", "nowhere.db"), "StoreError", "nowhere.db"),
        (("fly",), "UsageError", "fly"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(
    kvfarm: Line,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    kind: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [a.format(artifact=artifact) for a in arguments]
    assert kvfarm(*filled) == 2
    assert kvfarm.stdout == ""
    assert kvfarm.stderr.startswith("kvfarm: ")
    assert message in kvfarm.stderr
    assert kvfarm.stderr.count("\n") == 1
    said = kvfarm.json(*filled)["error"]
    assert said["type"] == kind
    assert message in said["message"]
    assert list(tmp_path.iterdir()) == []  # and nothing was left behind


def a_run(run_id: str) -> RunResults:
    return RunResults(
        run_id=run_id,
        started_at=f"2026-01-02T03:04:05+00:0{len(run_id)}",
        finished_at=None,
        command="",
        seed=0,
        model="tiny",
        reference="",
        provenance={},
        devices=(),
        recipes=(),
        checks=(),
        legs=(),
        planned_checks=1,
        planned_legs=0,
    )


def test_report_writes_a_stored_run_again(kvfarm: Line, tmp_path: Path) -> None:
    with open_store(tmp_path / "r.db") as store:
        store.begin_run(a_run("old"))
        store.begin_run(a_run("newer"))
    said = kvfarm.json("report", "--store", tmp_path / "r.db", "-o", tmp_path / "out")
    assert said["run_id"] == "newer"
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"index.html", "results.json", "junit.xml"}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["run_id"] == "newer"
    assert kvfarm.json("report", "old", "--store", tmp_path / "r.db", "-o", tmp_path / "o")["run_id"] == "old"
    listed = kvfarm.json("report", "--list", "--store", tmp_path / "r.db")["runs"]
    assert [run["run_id"] for run in listed] == ["newer", "old"]


def test_a_run_of_the_suite_that_cannot_start_is_not_a_success(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kvfarm = Line(capfd)
    said = kvfarm.json("run", "--model", tmp_path / "nowhere", "--report", tmp_path / "out", "--", "-q")
    assert kvfarm.code != 0
    assert not said["ok"]
    assert said["exit_code"] == kvfarm.code


WITHOUT = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
from harness import cli
sys.exit(cli.run(sys.argv[2:]))
"""
HEAVY = "ray,torch,transformers,sqlalchemy,altair,jinja2,pytest,hypothesis,onnx,safetensors,ml_dtypes"


def without(packages: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, packages, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_generate_from_text(kvfarm: Line, artifact: Path, checkpoint: Path) -> None:
    said = kvfarm.json("generate", artifact, "--prompt", "hi", "--max-new-tokens", "9")
    ids = ",".join(map(str, said["prompt_tokens"]))
    assert said["prompt_tokens"][0] == 2  # BOS, from the checkpoint's own tokenizer.json
    by_ids = kvfarm.json("generate", artifact, "--tokens", ids, "--max-new-tokens", "9")
    assert (by_ids["tokens"], by_ids["text"]) == (said["tokens"], None)
    assert said["text"]
    elsewhere = kvfarm.json("generate", artifact, "--prompt", "hi", "--tokenizer", checkpoint)
    assert elsewhere["prompt_tokens"] == said["prompt_tokens"]
    chat = kvfarm.json("generate", artifact, "--chat", "hi")
    assert len(chat["prompt_tokens"]) > len(said["prompt_tokens"])


def test_what_a_model_says_cannot_steer_the_terminal() -> None:
    from harness.cli.generate import _printable

    assert _printable("a\x1b[31mb\n[bold]c") == "a\ufffd[31mb\n\\[bold]c"


def test_generate_needs_no_more_than_the_engine(artifact: Path) -> None:
    done = without(HEAVY, "generate", str(artifact), "--tokens", "5,6", "--max-new-tokens", "2", "--json")
    assert len(json.loads(done.stdout)["tokens"]) == 2, done.stderr


def test_a_command_whose_package_is_missing_says_what_to_install(artifact: Path) -> None:
    done = without("sqlalchemy", "report", "--store", str(artifact / "model.onnx"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs the package sqlalchemy; pip install 'kvfarm[all]'" in done.stderr
