"""A large farm's run: 20 devices, each with 40 cells measured and 60 checks. Made up, none measured."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from reports.results import LegResult, RunResults
from reports.trend import Night, Series
from tests.reports.sample import CHECKS, check, device, leg, run, samples, vitals

DEVICES = tuple(f"phone-{number:02d}" for number in range(20))
RECIPES = ("naive", "int4-hybrid", "int4-int8kv", "float16")
PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CELLS = len(RECIPES) * len(PROMPTS)  # of each device
ALL_CHECKS = (*CHECKS, *(f"test_p{number}_holds" for number in range(9)))


def legs_of(name: str, seed: int) -> list[LegResult]:
    return [
        leg(
            name,
            recipe,
            "NOISY" if (seed + prompt) % 17 == 0 else "VALID",
            workload=f"prompt {prompt} + 64 new",
            prompt_tokens=prompt,
            samples=samples(5.0 * prompt, 20.0 + number, seed=seed * 1000 + number * 100 + prompt),
            load_ms=1800.0 + seed,
            vitals_before=vitals(0.0, warm=(seed * 7 + number * 3 + prompt) % 101 / 10),
            vitals_after=vitals(9.0, warm=(seed * 5 + number * 11 + prompt) % 97 / 10),
        )
        for number, recipe in enumerate(RECIPES)
        for prompt in PROMPTS
    ]


@cache
def large_run(suffix: str = "") -> RunResults:
    """suffix: of every device's name."""
    names = [name + suffix for name in DEVICES]
    checks = [
        check(name, recipe, test, worst_error=1e-5 + 1e-7 * i)
        for i, name in enumerate(names)
        for recipe in RECIPES
        for test in ALL_CHECKS
    ]
    base = run()
    return replace(
        base,
        devices=tuple(device(name, "a virtual phone" if i % 2 else "") for i, name in enumerate(names)),
        recipes=tuple(replace(base.recipes[0], name=recipe) for recipe in RECIPES),
        checks=tuple(checks),
        legs=tuple(each for i, name in enumerate(names) for each in legs_of(name, i)),
        planned_checks=len(checks),
        planned_legs=len(names) * CELLS,
    )


def large_trend(suffix: str = "", nights: int = 60) -> tuple[Series, ...]:
    """Three lines for each of ``large_run``'s cells; every eleventh steps up by a tenth at night 50."""
    random = np.random.default_rng(4)
    days = [f"2026-{7 + day // 30:02d}-{1 + day % 30:02d}T02:00:00+00:00" for day in range(nights)]
    cells = [
        (name, recipe, prompt, metric)
        for name in DEVICES
        for recipe in RECIPES
        for prompt in PROMPTS
        for metric in ("TTFT", "ITL", "Peak memory")
    ]
    lines = []
    for number, (name, recipe, prompt, metric) in enumerate(cells):
        values = 25.0 * np.exp(random.normal(0, 0.01, nights))
        values[50:] *= 1.1 if number % 11 == 0 else 1.0
        points = zip(days, values, strict=True)
        made = tuple(Night(f"run-{day}", day, float(value)) for day, value in points)
        workload = f"prompt {prompt} + 64 new"
        lines.append(Series(name + suffix, recipe, "gemma-3-1b-synth", workload, metric, "ms", made))
    return tuple(lines)
