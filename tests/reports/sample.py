"""A made-up run with everything the page must show. No number in it was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from reports.results import (
    CheckResult,
    DeviceInfo,
    Divergence,
    LegResult,
    MutantInfo,
    MutationScore,
    Outcome,
    RecipeInfo,
    RunResults,
    SampleInfo,
    TopLogits,
    VitalsInfo,
)

MIB = 1 << 20
HOST, PHONE, LOST = "host", "pixel-9", "galaxy-s24"
BEFORE, AFTER, SMALL = "before-growing", "after-hybrid", "hybrid-int8-kv"
DEVICES = (HOST, PHONE, LOST)
RECIPES = (BEFORE, AFTER, SMALL)
CHECKS = {
    "test_decode_equals_reference": "Every decode step equals the cacheless reference",
    "test_chunking_is_invisible": "Any chunking of the prompt equals one shot",
    "test_hybrid_equals_static": "The hybrid cache equals the static one",
    "test_reset_hides_the_past": "Reset hides the past",
    "test_poison_never_matters": "Poisoned unused rows never matter",
    "test_overflow_leaves_state_intact": "Overflow raises and leaves the state intact",
}
PROGRAM = json.dumps(
    {
        "capacity": 24,
        "operations": [
            {"kind": "prefill", "tokens": [5, 6, 7, 11, 3, 9, 2], "chunk": 3, "logits": "all"},
            {"kind": "poison"},
            {"kind": "decode", "tokens": [12, 40, 8]},
            {"kind": "generate", "token": 8, "count": 4},
        ],
        "slack": None,
        "version": 1,
    }
)
DIVERGENCE = Divergence(
    operation=2,
    row=1,
    position=8,
    error=0.3127,
    expected=TopLogits((311, 17, 42, 250, 8), (9.8121, 9.4410, 7.0032, 6.8125, 6.1100)),
    found=TopLogits((17, 311, 42, 8, 250), (9.6127, 9.4994, 7.0150, 6.7001, 6.6420)),
    layer=3,
)


def device(name: str, simulated: str = "", **changes: Any) -> DeviceInfo:
    """A device; every field may be changed."""
    fields: dict[str, Any] = {
        "name": name,
        "kind": "host" if name == HOST else "android",
        "model": {HOST: "x86-64 host", PHONE: "Pixel 9", LOST: "Galaxy S24"}.get(name, "unknown"),
        "soc": {PHONE: "Tensor G4", LOST: "Exynos 2400"}.get(name, ""),
        "abi": "x86_64" if name == HOST else "arm64-v8a",
        "os": "Debian 12" if name == HOST else "Android 16",
        "build": "6.1.0" if name == HOST else "google/tokay/tokay:16/BP2A/13:user/release-keys",
        "cores": 2 if name == HOST else 8,
        "ram_bytes": 8192 * MIB,
        "providers": ("cpu",) if name == HOST else ("cpu", "xnnpack", "nnapi"),
        "runtime": {"onnxruntime": "1.32.0", "numpy": "2.4.6"},
        "simulated": simulated,
    }
    return DeviceInfo(**{**fields, **changes})


def check(
    device: str = HOST,
    recipe: str = AFTER,
    name: str = "test_decode_equals_reference",
    outcome: Outcome = "passed",
    **changes: Any,
) -> CheckResult:
    """One check result."""
    tolerance = 0.05 if recipe == SMALL else 1e-4
    fields: dict[str, Any] = {
        "device": device,
        "recipe": recipe,
        "check": name,
        "title": CHECKS.get(name, name),
        "outcome": outcome,
        "seconds": 4.2,
        "programs": 100 if outcome in ("passed", "failed") else 0,
        "worst_error": tolerance * 0.11 if outcome == "passed" else None,
        "tolerance": tolerance,
    }
    return CheckResult(**{**fields, **changes})


def failed_check(device: str = HOST, recipe: str = AFTER, **changes: Any) -> CheckResult:
    """A wrong answer with its minimal program."""
    fields: dict[str, Any] = {
        "message": "decode step 1 of operation 2 differs from the reference by 0.3127, tolerance 1.0e-04",
        "program": PROGRAM,
        "divergence": DIVERGENCE,
        "replay": f"kvfarm run --devices={device} --recipe={recipe} --replay 4f1c9a",
        "worst_error": 9.0e-6,
        "programs": 37,
        "name": "test_poison_never_matters",
    }
    return check(device, recipe, outcome="failed", **{**fields, **changes})


def stopped_check(device: str = LOST, recipe: str = AFTER, **changes: Any) -> CheckResult:
    """A check that infrastructure stopped."""
    fields: dict[str, Any] = {
        "message": "RunnerDied: sought a frame, found end of stream after 1.8 s (exit code -9)",
        "stderr_tail": "I runner: session opened\nE lowmemorykiller: killed kvfarm-runner (pid 8123)",
    }
    return check(device, recipe, outcome="infrastructure", **{**fields, **changes})


def vitals(at: float, warm: float = 0.0) -> VitalsInfo:
    return VitalsInfo(
        at=at,
        load_1m=0.31 + warm / 10,
        mem_available_bytes=5120 * MIB,
        clocks_khz=(3_105_000, 3_105_000, 2_600_000),
        governor="schedutil",
        temperatures_c={"cpu": 41.5 + warm, "skin": 31.0 + warm / 2},
        thermal_status=0,
        battery_percent=84.0,
        battery_charging=False,
    )


def samples(
    ttft_ms: float, itl_ms: float, new_tokens: int = 64, repeats: int = 3, seed: int = 7
) -> tuple[SampleInfo, ...]:
    """Repeats with the long right tail that latencies have."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(repeats):
        gaps = itl_ms * (1 + random.gamma(1.5, 0.02, new_tokens - 1))
        gaps[random.random(new_tokens - 1) < 0.03] *= 1.5
        made.append(SampleInfo(ttft_ms * float(random.normal(1, 0.02)), tuple(float(g) for g in gaps)))
    return tuple(made)


def leg(
    device: str = HOST,
    recipe: str = AFTER,
    validity: Literal["VALID", "NOISY", "INVALID"] = "VALID",
    **changes: Any,
) -> LegResult:
    """One measured leg."""
    slow = {HOST: 1.0, PHONE: 1.7, LOST: 1.5}.get(device, 1.0)
    ttft, itl, rss, kv = {
        BEFORE: (1150.0, 31.0, 1490 * MIB, 208 * MIB),
        AFTER: (745.0, 25.5, 1180 * MIB, 52 * MIB),
        SMALL: (760.0, 26.4, 1142 * MIB, 14 * MIB),
    }.get(recipe, (500.0, 20.0, 900 * MIB, 26 * MIB))
    fields: dict[str, Any] = {
        "device": device,
        "recipe": recipe,
        "model": "gemma-3-1b-synth",
        "workload": "prompt 128 + 64 new",
        "prompt_tokens": 128,
        "new_tokens": 64,
        "load_ms": 1840.0 * slow,
        "samples": samples(ttft * slow, itl * slow, seed=len(device) + 10 * len(recipe)),
        "peak_rss_bytes": rss,
        "kv_bytes": kv,
        "nodes_by_provider": {"CPUExecutionProvider": 412},
        "threads": 2,
        "validity": validity,
        "reasons": {"VALID": (), "NOISY": ("load average 1.9 on 2 cores",), "INVALID": ("battery charging",)}[
            validity
        ],
        "vitals_before": vitals(0.0),
        "vitals_after": vitals(9.0, warm=3.5),
        "provenance": {
            "commit": "f61b6a9",
            "artifact sha256": "9f2c" * 16,
            "onnxruntime": "1.32.0",
            "build": "ORT Build Info: git-branch=rel-1.32.0",
        },
        "notes": (),
    }
    return LegResult(**{**fields, **changes})


def run(**changes: Any) -> RunResults:
    """A green run on one device with one recipe; ``planned_*`` follow the lists unless given."""
    fields: dict[str, Any] = {
        "run_id": "2025-11-23-1406-7d1e",
        "started_at": "2025-11-23T14:06:11+00:00",
        "finished_at": "2025-11-23T14:12:48+00:00",
        "command": "pytest --devices=farm --model gemma-3-1b-synth --report report -p no:randomly",
        "seed": 20251123,
        "model": "gemma-3-1b-synth",
        "reference": "transformers 5.23.0 Gemma3ForCausalLM, float32, no cache",
        "provenance": {"commit": "f61b6a9", "kvfarm": "0.1.0", "python": "3.11.2", "checkpoint": "a7e0" * 16},
        "devices": (device(HOST),),
        "recipes": (RecipeInfo(AFTER, {"weights": "int4, block 32", "cache": "hybrid, float32"}),),
        "checks": tuple(check(name=name) for name in CHECKS),
        "legs": (leg(),),
    }
    fields.update(changes)
    fields.setdefault("planned_checks", len(fields["checks"]))
    fields.setdefault("planned_legs", len(fields["legs"]))
    return RunResults(**fields)


def mutation(commit: str, survivor: bool = False) -> MutationScore:
    """Two mutants, of which one may survive."""
    common: dict[str, Any] = {"examples": 4, "seconds": 0.1, "recipe": "hybrid", "model": "w5"}
    return MutationScore(
        commit=commit,
        started_at="2026-11-24T20:00:00+00:00",
        seconds=200.0,
        seed=1,
        examples=40,
        mutants=(
            MutantInfo("window one too wide", 1, "ORT#25927", "P1", ("P4",), **common),
            MutantInfo("write at max_length", 34, "genai#2111", "" if survivor else "P3", (), **common),
        ),
        cannot_exist={"53": "ll#23044: a kernel of one CPU"},
        right_programs=10_040,
    )


def sample_run(**changes: Any) -> RunResults:
    """Three devices (one simulated, one lost midway), three recipes, failures, gaps, no end."""
    checks = [check(HOST, recipe, name) for recipe in RECIPES for name in CHECKS]
    checks += [check(PHONE, recipe, name) for recipe in RECIPES for name in CHECKS]
    checks += [check(LOST, BEFORE, name) for name in CHECKS]
    broken = {
        (PHONE, AFTER, "test_poison_never_matters"): failed_check(PHONE, AFTER),
        (HOST, SMALL, "test_chunking_is_invisible"): failed_check(
            HOST,
            SMALL,
            name="test_chunking_is_invisible",
            divergence=replace(DIVERGENCE, layer=None, operation=0, row=4, position=4),
        ),
        (LOST, BEFORE, "test_overflow_leaves_state_intact"): stopped_check(
            LOST, BEFORE, name="test_overflow_leaves_state_intact"
        ),
    }
    checks = [broken.get((c.device, c.recipe, c.check), c) for c in checks]
    legs = [leg(HOST, BEFORE), leg(HOST, AFTER), leg(HOST, AFTER), leg(HOST, SMALL, "NOISY")]
    legs += [leg(PHONE, recipe) for recipe in (BEFORE, AFTER)]
    legs += [leg(PHONE, SMALL, "INVALID", notes=("mem_opt.json has no effect on inference",))]
    legs += [leg(LOST, BEFORE, samples=samples(1700, 46, new_tokens=12, repeats=1))]
    fields: dict[str, Any] = {
        "finished_at": None,
        "devices": (
            device(HOST),
            device(PHONE, "a virtual phone: this host's CPU behind a real adb"),
            device(LOST),
        ),
        "recipes": (
            RecipeInfo(BEFORE, {"weights": "int4, block 32", "cache": "growing, float32", "threads": "2"}),
            RecipeInfo(AFTER, {"weights": "int4, block 32", "cache": "hybrid, float32", "threads": "2"}),
            RecipeInfo(SMALL, {"weights": "int4, block 32", "cache": "hybrid, int8", "threads": "2"}),
        ),
        "checks": tuple(checks),
        "legs": tuple(legs),
        "planned_checks": len(DEVICES) * len(RECIPES) * len(CHECKS),
        "planned_legs": 10,
        "infrastructure": ("galaxy-s24: adb: device offline; sought state 'device' for 30 s",),
    }
    return run(**{**fields, **changes})
