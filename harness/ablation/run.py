"""Measure the ladder on devices: each leg a fresh process, rounds interleaved, stored as measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from device_agents.errors import InfrastructureError
from harness.ablation.steps import Ladder, ladder, order
from harness.errors import InventoryError
from harness.measuring import Shape
from harness.recipes import parse_recipe
from harness.run import DeviceRun
from harness.run_options import RunOptions
from kvengine.recipe import Weights
from kvengine.spec import ModelSpec
from reports.ablation_results import AblationInfo
from reports.results import RunResults

# The context of the seed's own table: its 208 MB of cache are 1,024 tokens of 26 full-length layers.
SEED_SHAPE = Shape(prompt=960, new_tokens=64)

Step = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AblationOptions:
    """See ``kvfarm ablate --help``. rounds: timed legs of each step; repeats: generations a leg, after one
    that is not recorded."""

    devices: str
    model: Path
    store: str
    farm: Path | None = None
    farm_address: str | None = None
    cache: Path = Path(".kvfarm")
    weights: Weights = "int4"
    unquantised: bool = True
    shape: Shape = SEED_SHAPE
    rounds: int = 4
    repeats: int = 1
    energy: bool = False
    seed: int = 0
    command: tuple[str, ...] = ()


def ablate(options: AblationOptions, on_step: Step, on_leg: Step) -> RunResults:
    """Every device, one after the other in each place of the order.

    on_leg: called with what is measured next, legs done and legs planned.

    Raises:
        HarnessError, KvEngineError: a device, a recipe or the workload cannot be had.
        InfrastructureError: no farm. A single lost leg is in the results' infrastructure instead.
    """
    steps = ladder(options.weights, options.unquantised)
    run = DeviceRun(
        RunOptions(
            devices=options.devices,
            model=options.model,
            recipes=";".join(step.recipe for step in steps.all),
            store=options.store,
            farm=options.farm,
            farm_address=options.farm_address,
            cache=options.cache,
            seed=options.seed,
            shapes=(options.shape,),
            repeats=options.repeats,
            command=options.command,
        ),
        on_step=on_step,
        on_program=lambda _: None,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(run.close)
        if run.impossible:
            raise InventoryError(f"{run.impossible[0].name}: {run.impossible[0].reason}")
        plan = list(_plan(run, steps, options.rounds))
        run.ablation = _info(run, steps, options, len(plan))
        run.begin(planned_checks=0, planned_legs=len(plan))
        titles = {step.recipe: step.title for step in steps.all}
        for done, (device, recipe_name, first) in enumerate(plan):
            on_leg(f"{device} · {titles[recipe_name]}", done, len(plan))
            try:
                # A device that has no battery says at once that its energy is unsupported, and why.
                energy = first and (options.energy or run.identity(device).kind != "android")
                run.measure(device, options.model, run.recipes[recipe_name], weigh=first, energy=energy)
            except InfrastructureError as error:
                run.keep_lost_leg(device, recipe_name, error)
        on_leg("done", len(plan), len(plan))
    return run.finish(complete=True)


def _plan(run: DeviceRun, steps: Ladder, rounds: int) -> Iterator[tuple[str, str, bool]]:
    """(device, recipe, whether in the first round) of each leg. Memory does not drift: once is enough."""
    for turn in range(rounds):
        # Outside the ladder, several times as slow, and far from a close call: one pair of rounds will do.
        measured = steps.all if turn < 2 else steps.rungs
        for index in order(len(measured), turn):
            for device in run.devices:
                yield device, measured[index].recipe, turn == 0


def _info(run: DeviceRun, steps: Ladder, options: AblationOptions, planned: int) -> AblationInfo:
    """Every artifact is exported here, before the first leg: an export must not run between legs."""
    artifacts = [run.artifact(options.model, parse_recipe(step.recipe)) for step in steps.all]
    full = artifacts[len(steps.rungs) - 1].manifest
    return AblationInfo(
        steps=steps.rungs,
        unquantised=steps.unquantised,
        weights=options.weights,
        weights_bytes=sum(blob.size for blob in full.blobs),
        head_share=head_share(full.spec),
        rounds=options.rounds,
        planned=planned,
    )


def head_share(spec: ModelSpec) -> float:
    """Of the multiply-adds of a prompt token's matrices, those of the head; attention is not counted."""
    head = spec.vocab_size * spec.hidden_size
    layers = sum(
        2 * spec.hidden_size * layer.head_dim * (spec.num_heads + layer.kv_heads)
        + 3 * spec.hidden_size * spec.intermediate_size
        for layer in spec.layers
    )
    return head / (head + layers)
