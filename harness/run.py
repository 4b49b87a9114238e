"""One run over devices: opens what tests ask for, keeps what they find, stops what it started."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from device_agents.api import DeviceIdentity
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError
from harness import choosing, inventory
from harness.artifacts import artifact_of, resolved
from harness.checking import Cell, Tally
from harness.errors import InventoryError
from harness.farm import LOCAL_ROOT, DeviceSession, Farm
from harness.handover import Handover, RunFolder
from harness.inventory import effort_of, share
from harness.legs import LegPlan, Subject, measure_leg
from harness.measuring import Shape
from harness.mutants import score
from harness.provenance import command_line, now, provenance
from harness.quiet import WAIT_S, Quiet, locked
from harness.recipes import ForeignModel, Recipe, parse_recipes, settings, with_plan
from harness.recovery import Recovery, RecoveryPolicy
from harness.reference import Reference, offer_reference, share_reference, start_reference
from harness.reference.rounded import is_exact, rounded_checkpoint
from harness.store import open_store
from harness.store.protocol import Store
from kvengine.artifact import Artifact
from kvengine.codec import decode, encode
from kvengine.plan import PlanKind
from kvengine.recipe import ExportRecipe
from kvengine.session import EngineSession
from reports.ablation_results import AblationInfo
from reports.results import (
    CheckResult,
    DeviceInfo,
    LegResult,
    NotPlanned,
    NotRun,
    RecipeInfo,
    RunResults,
)

if TYPE_CHECKING:
    from reports.trend import Series


@dataclass(frozen=True)
class RunOptions:
    """What the command line asked for. Paths are as given; see ``harness.plugin`` for the defaults."""

    devices: str
    model: Path
    recipes: str
    store: str
    report: Path | None = None
    farm: Path | None = None
    farm_address: str | None = None
    cache: Path = Path(".kvfarm")
    examples: int = 25
    seed: int | None = None
    shapes: tuple[Shape, ...] = (Shape(),)  # the workloads that each recipe is measured with
    repeats: int = 3
    # Further (checkpoint, recipes, devices) to measure, not to check; no device is all of them.
    measure: tuple[tuple[Path, str, tuple[str, ...]], ...] = ()
    energy: bool = False  # also measure energy for each token: minutes a leg
    recovery: RecoveryPolicy = field(default_factory=RecoveryPolicy)
    command: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


class DeviceRun:
    """The state of one run. Nothing is started before it is first needed.

    handover: of the controller, where this process is one of several workers of its run.

    Raises (from the constructor):
        InventoryError, RecipeError: an unknown device or recipe.
        InvalidModel, ContractIncomplete, UnsupportedModel: a model brought as ONNX cannot be driven.
    """

    def __init__(
        self,
        options: RunOptions,
        on_step: Callable[[str, int, int], None],
        on_program: Callable[[Tally], None],
        on_retry: Callable[[str, str], None] = lambda device, reason: None,
        handover: Handover | None = None,
    ) -> None:
        self.options = options
        self._handover = handover
        self._on_step = on_step
        self._on_program = on_program
        self.begun = False
        self.recipes = {r.name: resolved(r, options.model) for r in parse_recipes(options.recipes)}
        self._further = [
            (model, resolved(recipe, model), names)
            for model, text, names in options.measure
            for recipe in parse_recipes(text)
        ]
        self.planned_checks = self.planned_legs = 0
        self.not_run: tuple[NotRun, ...] = ()
        self.trend: tuple[Series, ...] = ()  # of its cells over stored runs, once it has finished
        self.ablation: AblationInfo | None = None  # what the legs are for, where they are an ablation's
        self._sessions: dict[tuple[str, str, str], DeviceSession] = {}
        self._references: dict[Path, Reference] = {}
        self._artifacts: dict[tuple[Path, ExportRecipe, ForeignModel | None], Artifact] = {}
        self._identities: dict[str, DeviceIdentity] = {}
        self._stored: set[str] = set()  # devices
        self._offered: list[object] = []  # references that end when they are forgotten
        self._quiet: dict[str, Quiet] = {}  # by lab host
        self._farm: Farm | None = None
        self.recovery = Recovery(self._answers, options.recovery, self._set_aside, on_retry)
        self._provenance = provenance()
        if handover is not None:
            self.seed, self.run_id, self.started_at = handover.seed, handover.run_id, handover.started_at
            self.inventory, self.devices = handover.inventory, handover.devices
            self.passed_over = handover.passed_over
            return
        self.seed = options.seed if options.seed is not None else secrets.randbits(32)
        self.started_at = now()
        self.run_id = f"{self.started_at.replace(':', '').replace('+0000', 'Z')}-{self.seed:08x}"
        selection = choosing.read(options.devices, inventory.load(options.farm))
        self.inventory, self.devices = selection.inventory, selection.names
        self.passed_over = selection.passed_over
        if selection.condition is not None:
            self._choose(selection)
        self._check_recipes()

    def _check_recipes(self) -> None:
        for _, recipe, names in self._further:
            if missing := set(names) - set(self.devices):
                raise InventoryError(
                    f"--measure {recipe.name}@{min(missing)}: sought one of this run's devices, which are "
                    f"{', '.join(self.devices)}"
                )
        for device in self.devices:
            if not self.recipes_of(device):
                wanted = ", ".join(self.inventory.device(device).recipes)
                raise InventoryError(
                    f"device {device!r} is for recipes {wanted}; none of them is in {self.options.recipes!r}"
                )

    def recipes_of(self, device: str) -> list[Recipe]:
        """Those of the run's recipes that ``device`` is for."""
        entry = self.inventory.device(device)
        return [recipe for recipe in self.recipes.values() if entry.wants(recipe.name)]

    def measured_on(self, device: str) -> list[tuple[Path, Recipe]]:
        """Each checkpoint and recipe that is to be measured on ``device``."""
        return [(self.options.model, recipe) for recipe in self.recipes_of(device)] + [
            (model, recipe) for model, recipe, names in self._further if not names or device in names
        ]

    def hand_over(self, folder: RunFolder) -> Handover:
        """Open the farm to workers, which find there what they are to share. Slow devices come first.

        Raises:
            InfrastructureError: the farm cannot be opened.
        """
        self.devices = tuple(sorted(self.devices, key=self.effort))
        connection = self.farm.invite()
        names = {self._reference_name(recipe) for recipe in self.recipes.values()}
        self._offered = [offer_reference(name) for name in sorted(names)]
        return Handover(
            run_id=self.run_id,
            started_at=self.started_at,
            seed=self.seed,
            inventory=self.inventory,
            devices=self.devices,
            passed_over=self.passed_over,
            controller=os.getpid(),
            address=connection.address,
            private=not connection.joined,
            folder=str(folder.path),
        )

    def begin(self, planned_checks: int, planned_legs: int, not_run: tuple[NotRun, ...] = ()) -> None:
        """The plan is known: from here on the store has the run.

        not_run: those of the planned tests that have no device to run on.
        """
        self.planned_checks, self.planned_legs, self.not_run = planned_checks, planned_legs, not_run
        self.store.begin_run(self.header())
        self.begun = True
        for name in self._identities:
            self._store_device(name)

    def resume(self) -> None:
        """In a worker, before its first test: the store has the run, and knows who is in quarantine."""
        self.begun = True
        for device in self.store.results(self.run_id).devices:
            if device.quarantined:
                self.recovery.recall(device.name, device.quarantined)
                self._stored.add(device.name)

    # -- what tests use ---------------------------------------------------------------------------

    def cell(self, device: str, recipe_name: str) -> Cell:
        """The cell of one device and recipe; its sessions are opened by the first program."""
        recipe = self.recipes[recipe_name]
        with self.working(device):
            spec = self.artifact(self.options.model, recipe).manifest.spec
            reference = self.reference(recipe)
        return Cell(
            device=device,
            recipe=recipe,
            spec=spec,
            reference=reference,
            open_plan=lambda plan: self.session(device, recipe, plan),
            examples=share(self.options.examples, self.effort(device), 1),
            seed=self.seed,
            database=str(self.options.cache / "examples"),
            on_program=self._on_program,
        )

    def session(self, device: str, recipe: Recipe, plan: PlanKind) -> EngineSession:
        """The open session for ``recipe`` with cache plan kind ``plan``; a dead one is opened again."""
        key = (device, recipe.name, plan)
        session = self._sessions.get(key)
        if session is None or session.closed:
            artifact = self.artifact(self.options.model, with_plan(recipe, plan))
            session = self._sessions[key] = self.farm.open(device, artifact, recipe.session, self._on_step)
        return session

    def leave(self, device: str, recipe_name: str) -> None:
        """Close the sessions of one cell; the next cell should find the device idle."""
        for key in [k for k in self._sessions if k[:2] == (device, recipe_name)]:
            self._sessions.pop(key).close()

    def give_back(self, device: str) -> None:
        """Nothing more is to be done on the device: others may have it."""
        for key in [key for key in self._sessions if key[0] == device]:
            self._sessions.pop(key).close()
        if self._farm is not None:
            self._farm.give_back(device)

    def measure(
        self,
        device: str,
        model: Path,
        recipe: Recipe,
        shape: Shape | None = None,
        *,
        weigh: bool = True,
        energy: bool | None = None,
    ) -> LegResult:
        """One leg in a fresh process, stored before it is returned; what infrastructure stops is begun anew.

        shape: of the workload; None: the options' first. weigh: see LegPlan. energy: None: see options.

        Raises:
            InfrastructureError: also for a device in quarantine; see Recovery.attempt.
        """
        options = self.options
        energy = options.energy if energy is None else energy
        plan = LegPlan(
            shape=shape or options.shapes[0],
            repeats=share(options.repeats, self.effort(device), 2),
            seed=self.seed,
            weigh=weigh,
            calibrations=options.cache / "calibrations" if energy else None,
        )
        retries: list[str] = []
        leg = self.recovery.attempt(device, lambda: self._measure(device, model, recipe, plan), retries)
        provenance = leg.provenance | {"effort": f"{self.effort(device):g}"}
        leg = dataclasses.replace(leg, retries=tuple(retries), provenance=provenance)
        self.store.add_leg(self.run_id, leg)
        return leg

    def _measure(self, device: str, model: Path, recipe: Recipe, plan: LegPlan) -> LegResult:
        with self.working(device):
            subject = Subject(model.name, recipe, self.artifact(model, recipe))
        with self._alone(device):
            identity = self.identity(device)
            return measure_leg(self.farm, identity, subject, plan, self._provenance["commit"], self._on_step)

    def keep(self, check: CheckResult) -> None:
        """Store a check's result; durable when this returns."""
        self.store.add_check(self.run_id, check)

    def keep_lost_leg(self, device: str, what: str, error: InfrastructureError) -> None:
        """Store why a measurement gave no result."""
        self.keep_lost(f"{device}: {what}: {type(error).__name__}: {error}")

    def keep_lost(self, message: str) -> None:
        """Store what went wrong that belongs to no single check."""
        self.store.add_infrastructure(self.run_id, message)

    def replay_command(self, device: str, recipe_name: str, program_json: str) -> str:
        words = ["kvfarm", "replay", program_json, "--devices", device, "--model", str(self.options.model)]
        return shlex.join([*words, "--recipe", recipe_name])

    # -- what they stand on -----------------------------------------------------------------------

    def effort(self, device: str) -> float:
        """Share in (0, 1] of the programs and repeats asked for that the device gets."""
        return effort_of(self.inventory.device(device))

    @contextmanager
    def working(self, device: str) -> Iterator[None]:
        """While the body runs no device is measured that this one's work would disturb."""
        quiet = self._quiet_of(device)
        with quiet.shared() if quiet else nullcontext():
            yield

    @contextmanager
    def _alone(self, device: str) -> Iterator[None]:
        """While the body runs no device works that would disturb this one's measurement."""
        quiet = self._quiet_of(device)
        with quiet.alone() if quiet else nullcontext():
            yield

    def take_waited(self) -> float:
        """Seconds waited for other devices since the last call."""
        waited = sum(quiet.waited_s for quiet in self._quiet.values())
        for quiet in self._quiet.values():
            quiet.waited_s = 0.0
        return waited

    def _quiet_of(self, device: str) -> Quiet | None:
        """None where nothing else works meanwhile, or the device computes by itself."""
        entry = self.inventory.device(device)
        if self._handover is None or not entry.shares_cpu:
            return None
        if entry.lab not in self._quiet:
            self._quiet[entry.lab] = Quiet(
                LOCAL_ROOT / "quiet" / entry.lab,
                lambda: self._on_step("waits for the other devices of this machine", 0, 0),
            )
        return self._quiet[entry.lab]

    def artifact(self, model: Path, recipe: Recipe) -> Artifact:
        """Exported, or found and verified; once a run for each model and recipe."""
        key = (model, recipe.export, recipe.foreign)
        if key not in self._artifacts:
            with self._making():
                root = self.options.cache / "artifacts"
                self._artifacts[key] = artifact_of(model, recipe, root, self._on_step)
        return self._artifacts[key]

    @contextmanager
    def _making(self) -> Iterator[None]:
        """What several processes want, one makes and the others find."""
        self.options.cache.mkdir(parents=True, exist_ok=True)
        with locked(self.options.cache / "making.lock", Deadline(WAIT_S)):
            yield

    @cached_property
    def store(self) -> Store:
        return open_store(self.options.store)

    @property
    def farm(self) -> Farm:
        """The farm, started at first use, with every selected device's identity stored."""
        if self._farm is None:
            self._on_step("starting the farm", 0, 0)
            if (shared := self._handover) is not None:
                root = LOCAL_ROOT if shared.private else None
                farm = Farm(self.inventory, self.devices, shared.address, root=root, guest=True)
            else:
                farm = Farm(self.inventory, self.devices, self.options.farm_address)
            farm.__enter__()
            self._farm = farm
        return self._farm

    def reference(self, recipe: Recipe) -> Reference:
        """The oracle on the weights that ``recipe`` keeps; one actor for each set of weights."""
        checkpoint = self.options.model
        # How a foreign exporter rounds its weights is not ours to know: it is judged by the checkpoint's.
        if not _judged_exactly(recipe):
            with self._making():
                checkpoint = rounded_checkpoint(checkpoint, recipe.export, self.options.cache / "rounded")
        if checkpoint not in self._references:
            _ = self.farm  # Ray runs from here on
            self._on_step("loading the reference", 0, 0)
            self._references[checkpoint] = (
                share_reference(self._reference_name(recipe), checkpoint)
                if self._handover
                else start_reference(checkpoint)
            )
        return self._references[checkpoint]

    def _reference_name(self, recipe: Recipe) -> str:
        """Of the actor that all workers of this run share; one for each set of weights."""
        export = recipe.export
        weights = "exact" if _judged_exactly(recipe) else f"{export.weights}-{export.block_size}"
        return f"reference-{self.run_id}-{weights}"

    def identity(self, device: str) -> DeviceIdentity:
        """Who the device is; asked and stored once a run."""
        if device not in self._identities:
            self._identities[device] = self.farm.identity(device)
        if self.begun:
            self._store_device(device)
        return self._identities[device]

    def _store_device(self, device: str) -> None:
        if device not in self._stored and device in self.devices:
            self.store.add_device(self.run_id, self._info(device))
            self._stored.add(device)

    def _info(self, device: str) -> DeviceInfo:
        info = decode(DeviceInfo, encode(self._identities[device]))
        return dataclasses.replace(info, effort=self.effort(device))

    def identity_for_choice(self, device: str) -> DeviceIdentity | None:
        """Who the device is, None if it does not answer; the same for all workers of a run."""
        try:
            if self._handover is None:
                return self.identity(device)
            folder = RunFolder(Path(self._handover.folder))
            text = folder.once(
                f"identity-{quote(device, safe='')}", lambda: self._identity_json(device), WAIT_S
            )
        except InfrastructureError:
            return None
        if text:
            self._identities[device] = decode(DeviceIdentity, json.loads(text))
        return self._identities.get(device)

    def _identity_json(self, device: str) -> str:
        """ "" for one that does not answer."""
        try:
            return json.dumps(encode(self.identity(device)))
        except InfrastructureError:
            return ""

    def _choose(self, selection: choosing.Selection) -> None:
        """Ask the farm's devices who they are; the farm stays open for those that are chosen."""
        try:
            statuses = self.farm.status()
            choice = selection.choose(statuses)
        except BaseException:
            self.close()
            raise
        self.devices, self.passed_over = choice.names, choice.passed_over
        self._identities = {s.name: s.identity for s in statuses if s.identity is not None}

    def _answers(self, device: str) -> None:
        self.farm.vitals(device)

    def _set_aside(self, device: str, evidence: str) -> None:
        """A device in quarantine: the store says so, and nothing of it is kept open."""
        self.store.add_infrastructure(self.run_id, f"{device} was quarantined: {evidence}")
        if device in self._identities:
            info = dataclasses.replace(self._info(device), quarantined=evidence)
            self.store.add_device(self.run_id, info)
            self._stored.add(device)
        for key in [key for key in self._sessions if key[0] == device]:
            self._sessions.pop(key)  # to close it would mean to wait for the device

    def header(self) -> RunResults:
        """The run without its results."""
        named = self.recipes | {recipe.name: recipe for _, recipe, _ in self._further}
        return RunResults(
            run_id=self.run_id,
            started_at=self.started_at,
            finished_at=None,
            command=command_line(self.options.command),
            seed=self.seed,
            model=self.options.model.name,
            reference=f"transformers {self._provenance['transformers']}, float32, no cache",
            provenance=self._provenance | self._selected(),
            devices=(),
            recipes=tuple(RecipeInfo(name, settings(recipe)) for name, recipe in named.items()),
            checks=(),
            legs=(),
            planned_checks=self.planned_checks,
            planned_legs=self.planned_legs,
            not_run=self.not_run,
            not_planned=tuple(self._not_planned()),
            ablation=self.ablation,
            mutation=score.load(self.options.cache),
            tags=self.options.tags,
        )

    def _not_planned(self) -> Iterator[NotPlanned]:
        """Devices and recipes of this run that do not belong together, and why."""
        measured = [recipe.name for _, recipe, _ in self._further if recipe.name not in self.recipes]
        for device in self.devices:
            wanted = self.inventory.device(device).recipes
            planned = {recipe.name for recipe in self.recipes_of(device)}
            for name in self.recipes:
                if name not in planned:
                    yield NotPlanned(device, name, f"farm.toml: {device} is for recipes {', '.join(wanted)}")
            for name in dict.fromkeys(measured):
                here = {recipe.name for _, recipe in self.measured_on(device)}
                why = "measured, not checked (--measure)" if name in here else "not measured here (--measure)"
                yield NotPlanned(device, name, why)

    def _selected(self) -> dict[str, str]:
        """Who was passed over is said where the run is signed."""
        passed = "; ".join(f"{each.name}: {each.reason}" for each in self.passed_over)
        return {"devices": self.options.devices} | ({"devices not chosen": passed} if passed else {})

    def finish(self, complete: bool) -> RunResults:
        """Stop everything; with ``complete`` the run counts as finished, else as interrupted."""
        try:
            self.close()
        except InfrastructureError as error:
            self.store.add_infrastructure(self.run_id, f"while stopping: {error}")
        if complete:
            self.store.finish_run(self.run_id, now())
        results = self.store.results(self.run_id)
        if self.options.report is not None:
            from harness.trends import series_of_run  # and its libraries, which workers never need

            self.trend = series_of_run(self.store, results)
        self.store.close()
        return results

    def close(self) -> None:
        """Close sessions, give devices back, stop Ray if this run started it."""
        self._sessions.clear()
        self._references.clear()
        self._offered.clear()
        if self._farm is not None:
            self._farm.__exit__(None, None, None)
            self._farm = None


def _judged_exactly(recipe: Recipe) -> bool:
    """Whether the reference is the checkpoint itself, unrounded."""
    return recipe.foreign is not None or is_exact(recipe.export)
