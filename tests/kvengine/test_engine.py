"""The engine session: programs, workloads, and no word to anybody outside."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from harness.reference import TransformersReference
from kvengine.engine import LocalEngine, _slowed, peak_rss_bytes
from kvengine.errors import InvalidRequest
from kvengine.plan import CachePlan, PlanKind
from kvengine.process import process_environment
from kvengine.program import Decode, Generate, Load, Poison, Prefill, Program, Reset, Save, Workload
from kvengine.recipe import ExportRecipe, SessionRecipe
from kvengine.rope import rope_tables
from kvengine.spec import RopeSpec
from kvengine.threads import choose_threads
from tests.conftest import ExportTiny, OpenTiny


@pytest.fixture(scope="module")
def engine(open_tiny: OpenTiny) -> LocalEngine:
    return open_tiny(ExportRecipe(cache=CachePlan("hybrid", slack=4)))


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> TransformersReference:
    return TransformersReference(tiny_checkpoint)


@pytest.mark.parametrize("kind", ["growing", "static", "hybrid"])
def test_200_greedy_tokens_are_those_of_transformers_generate(
    open_tiny: OpenTiny, reference: TransformersReference, kind: PlanKind
) -> None:
    engine = open_tiny(ExportRecipe(cache=CachePlan(kind)))
    prompt = (2, 17, 230, 5)
    first, generated = engine.run_program(
        Program(210, (Prefill(prompt[:-1], 0, "last"), Generate(prompt[-1], 200)))
    )
    assert first.error is None
    assert generated.tokens == reference.greedy(prompt, 200)
    whole = prompt + generated.tokens[:-1]
    (checked,) = engine.run_program(Program(210, (Prefill(whole, 16),)))
    np.testing.assert_allclose(checked.logits, reference.logits(whole), rtol=0, atol=1e-4)


def test_one_observation_an_operation_in_order(engine: LocalEngine) -> None:
    operations = (
        Prefill((1, 2, 3)),
        Decode((4, 5)),
        Poison(),
        Prefill((6, 7), 1, "last"),
        Generate(8, 3),
        Reset(),
        Decode((999,)),
        Decode((1,)),
    )
    observations = engine.run_program(Program(20, operations))
    assert [o.position for o in observations] == [3, 5, 5, 7, 10, 0, 0, 1]
    assert [len(o.logits) for o in observations] == [3, 2, 0, 1, 0, 0, 0, 1]
    assert [len(o.tokens) for o in observations] == [0, 0, 0, 0, 3, 0, 0, 0]
    assert [o.error.type if o.error else "" for o in observations] == [""] * 6 + ["InvalidToken", ""]


def test_a_program_starts_from_nothing(engine: LocalEngine) -> None:
    program = Program(20, (Prefill((5, 6, 7)), Decode((8,))))
    first, second = engine.run_program(program), engine.run_program(program)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)


def test_a_workload_gives_raw_samples(engine: LocalEngine) -> None:
    measured = engine.run_workload(Workload((1, 2, 3), new_tokens=5, repeats=3, warmup=2, chunk=2))
    assert len(measured.samples) == 3
    for sample in measured.samples:
        assert sample.ttft_ms > 0
        assert len(sample.itl_ms) == 4
        assert len(sample.tokens) == 5
    assert len({sample.tokens for sample in measured.samples}) == 1
    assert measured.kv_bytes == engine.model.plan.total_bytes(engine.model.spec, 8)
    assert measured.threads == 1
    assert measured.load_ms > 0
    assert 0 < measured.peak_rss_bytes <= peak_rss_bytes()


@pytest.mark.parametrize(
    "bad",
    [
        Workload((1,), 0),
        Workload((1,), 2, repeats=0),
        Workload((1,), 2, warmup=-1),
        Workload((1,), 2, slowdown=11.0),
        Workload((1,), 2, slowdown=-0.1),
        Workload((1,), 2, ballast_bytes=-1),
    ],
)
def test_a_senseless_workload_is_refused(engine: LocalEngine, bad: Workload) -> None:
    with pytest.raises(InvalidRequest, match="sought"):
        engine.run_workload(bad)


def test_a_context_is_there_before_the_prompt_and_not_timed(engine: LocalEngine) -> None:
    """The same tokens follow as after one prompt of both parts, and other ones than without it."""
    parts = engine.run_workload(Workload((7, 8), 6, repeats=2, warmup=0, context=tuple(range(40))))
    whole = engine.run_workload(Workload((*range(40), 7, 8), 6, repeats=1, warmup=0))
    assert {s.tokens for s in parts.samples} == {whole.samples[0].tokens}
    assert parts.kv_bytes == whole.kv_bytes
    assert engine.run_workload(Workload((7, 8), 6, repeats=1, warmup=0)).samples[0].tokens != (
        whole.samples[0].tokens
    )


def test_an_injected_slowdown_spins_for_its_share_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(10.0, 0.001)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert _slowed(8.0, 10.0, 0.05) == pytest.approx(10.1, abs=0.002)
    assert _slowed(8.0, 10.0, 0.0) == 10.0


def test_an_injection_changes_no_token(engine: LocalEngine) -> None:
    plain = Workload((1, 2, 3), new_tokens=5, repeats=1)
    heavy = dataclasses.replace(plain, slowdown=0.5, ballast_bytes=1 << 20)
    assert engine.run_workload(heavy).samples[0].tokens == engine.run_workload(plain).samples[0].tokens


def test_ballast_weighs_what_it_says(export_tiny: ExportTiny) -> None:
    """In processes of their own: a peak never falls again."""
    folder = export_tiny(ExportRecipe()).folder
    script = (
        "import sys; from kvengine.engine import LocalEngine; from kvengine.program import Workload;"
        "from kvengine.recipe import SessionRecipe;"
        "engine = LocalEngine.open(sys.argv[1], SessionRecipe(threads=1));"
        "print(engine.run_workload(Workload((1, 2), 3, ballast_bytes=int(sys.argv[2]))).peak_rss_bytes)"
    )
    ballast = 64 << 20
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", script, str(folder), str(held)], timeout=60))
        for held in (0, ballast)
    ]
    assert 0.9 * ballast < peaks[1] - peaks[0] < 1.1 * ballast


def test_onnxruntime_leaves_no_telemetry_behind(export_tiny: ExportTiny, tmp_path: Path) -> None:
    """Its wheels write a device id and a database under HOME at import, unless told not to."""
    code = (
        "from kvengine.engine import LocalEngine\n"
        "from kvengine.recipe import SessionRecipe\n"
        "from kvengine.program import Workload\n"
        f"LocalEngine.open({str(export_tiny(ExportRecipe()).folder)!r}, SessionRecipe(threads=1))"
        ".run_workload(Workload((1, 2), 3))"
    )
    # Continuous integration variables switch it off by themselves and would hide a leak.
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert list(tmp_path.rglob("*")) == []


def test_without_the_switch_telemetry_would_have_been_there(tmp_path: Path) -> None:
    """So that the test above cannot pass for another reason."""
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
    code = "import onnxruntime"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert any("onnxruntime" in path.name for path in tmp_path.rglob("*"))


def test_rope_tables_follow_the_formula() -> None:
    cos, sin = rope_tables(RopeSpec(theta=100.0, factor=2.0), positions=7, head_dim=8)
    assert cos.shape == sin.shape == (7, 4)
    for position in range(7):
        for j in range(4):
            angle = position / 2.0 * 100.0 ** (-2 * j / 8)
            assert cos[position, j] == pytest.approx(np.cos(angle), abs=1e-6)
            assert sin[position, j] == pytest.approx(np.sin(angle), abs=1e-6)


def fake_cpus(root: Path, clocks: dict[int, int], siblings: dict[int, str] | None = None) -> Path:
    for cpu, clock in clocks.items():
        folder = root / f"cpu{cpu}"
        (folder / "cpufreq").mkdir(parents=True)
        (folder / "cpufreq" / "cpuinfo_max_freq").write_text(f"{clock}\n")
        if siblings:
            (folder / "topology").mkdir()
            (folder / "topology" / "thread_siblings_list").write_text(siblings[cpu] + "\n")
    return root


@pytest.mark.parametrize(
    ("clocks", "siblings", "threads"),
    [
        ({0: 2_000_000, 1: 2_000_000, 2: 2_000_000, 3: 2_000_000}, None, 4),
        ({0: 1_800_000, 1: 1_800_000, 2: 3_000_000, 3: 3_000_000}, None, 2),  # little cores left out
        ({0: 3_000_000, 1: 3_000_000}, {0: "0-1", 1: "0-1"}, 1),  # one core, two hardware threads
        ({}, None, 4),  # clocks cannot be read
        (dict.fromkeys(range(32), 2_000_000), None, 8),
    ],
)
def test_threads_are_the_fast_physical_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clocks: dict[int, int],
    siblings: dict[int, str] | None,
    threads: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(clocks or range(4)))
    assert choose_threads(fake_cpus(tmp_path, clocks, siblings)) == threads


def test_a_process_that_others_come_before_says_so() -> None:
    asked = "from kvengine.process import process_notes; print(*process_notes())"
    said = subprocess.run(
        ["nice", "-n", "5", sys.executable, "-c", asked], capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith(f"decodes at nice {os.getpriority(os.PRIO_PROCESS, 0) + 5}: ")


def test_a_runner_is_started_with_huge_pages_unless_somebody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert process_environment(SessionRecipe()) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    chosen = SessionRecipe(environment={"GLIBC_TUNABLES": "x", "A": "b"})
    assert process_environment(chosen) == {"GLIBC_TUNABLES": "x", "A": "b"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    assert process_environment(SessionRecipe()) == {}


def test_the_name_of_a_saved_state_is_no_path(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for name in ("../../evil", str(tmp_path / "evil"), "a/b"):
        found = engine.run_program(Program(8, (Prefill((1, 2)), Save(name), Load(name), Decode((3,)))))
        assert [each.error for each in found] == [None] * 4
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]
