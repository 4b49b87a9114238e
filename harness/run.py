"""One run over devices: opens what tests ask for, keeps what they find, stops what it started."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from device_agents import logs
from device_agents.api import DeviceIdentity
from device_agents.errors import InfrastructureError
from harness import choosing, resuming
from harness.artifacts import resolved
from harness.checking import Cell, Tally
from harness.discovery import PassedOver
from harness.errors import InventoryError, NotFit
from harness.handover import Handover, RunFolder
from harness.health import Health, tell_of_devices
from harness.impossible import impossible
from harness.inventory import SIMULATED, effort_of, share
from harness.lab import leases_folder
from harness.legs import LegPlan, Subject, attempt_leg, measure_leg
from harness.measuring import Shape
from harness.opened import Opened
from harness.provenance import now, provenance
from harness.quiet import WAIT_S
from harness.recipes import Recipe, parse_recipes
from harness.recovery import Recovery
from harness.resuming import Done, RunLock
from harness.run_header import header_of
from harness.run_options import RunOptions
from harness.spans import Recorder
from harness.store.protocol import Span
from harness.store.spool import SpoolingStore
from kvengine.codec import decode, encode
from reports.ablation_results import AblationInfo
from reports.results import (
    CheckResult,
    DeviceInfo,
    LegResult,
    NotRun,
    RunResults,
)

if TYPE_CHECKING:
    from reports.trend import Series

_log = logging.getLogger(__name__)


class DeviceRun(Opened):
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
        on_wait: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(options, on_step, on_wait, handover)
        self._lock: RunLock | None = None
        self._on_program = on_program
        self.begun = False
        self.recipes = {r.name: resolved(r, options.model) for r in parse_recipes(options.recipes)}
        self.further = [
            (model, resolved(recipe, model), names)
            for model, text, names in options.measure
            for recipe in parse_recipes(text)
        ]
        self.planned_checks = self.planned_legs = 0
        self.not_run: tuple[NotRun, ...] = ()
        self.trend: tuple[Series, ...] = ()  # of its cells over stored runs, once it has finished
        self.impossible: tuple[PassedOver, ...] = ()  # devices that were named, and cannot be on this machine
        self.ablation: AblationInfo | None = None  # what the legs are for, where they are an ablation's
        self._identities: dict[str, DeviceIdentity] = {}
        self._stored: set[str] = set()  # devices
        self._bandwidth_of: set[str] = set()  # devices whose was measured
        self._tell_retry = on_retry
        self._health = Health(self)
        self.recovery = Recovery(
            self._health.answers,
            options.recovery,
            self._set_aside,
            self._on_retry,
            self._revive,
            on_sick=self._health.sick,
            restart=self._health.reboot,
        )
        self.provenance = provenance()
        self.recorder = Recorder(lambda span: self.store.add_span(self.run_id, span) if self.begun else None)
        self.done: frozenset[Done] = frozenset()  # of an earlier process of this run
        self.before: RunResults | None = None  # the run as an earlier process left it
        self._test, self._legs_of_test = "", 0
        self._to_acknowledge: list[tuple[str, str]] = []  # (device, key) of stored legs
        if handover is not None:
            self.seed, self.run_id, self.started_at = handover.seed, handover.run_id, handover.started_at
            self.inventory, self.devices = handover.inventory, handover.devices
            self.passed_over = handover.passed_over
            self.impossible = handover.impossible
            self.done = frozenset(Done(*each) for each in handover.done)
            logs.always_about(run=self.run_id)
            return
        self.seed = options.seed if options.seed is not None else secrets.randbits(32)
        self.started_at = now()
        # Not the seed: two runs with one seed may begin in the same second.
        moment = self.started_at.replace(":", "").replace("+0000", "Z")
        self.run_id = options.resume or f"{moment}-{secrets.token_hex(4)}"
        logs.always_about(run=self.run_id)
        try:
            self._lock = RunLock(leases_folder() / "runs", self.run_id)
            selection = choosing.read(
                options.devices, choosing.inventory_for(options.farm, options.farm_address)
            )
            self.inventory, self.devices = selection.inventory, selection.names
            self.passed_over = selection.passed_over
            if options.resume:
                self._go_on()
            elif selection.condition is not None:
                self._choose(selection)
            else:
                self._leave_out_the_impossible()
            self._check_recipes()
        except BaseException:
            self.close()
            raise

    def _leave_out_the_impossible(self) -> None:
        """Raises InventoryError: in CI."""
        self.impossible = impossible(self.devices, self.inventory, self.options.cache)
        self.passed_over += self.impossible
        nowhere = {each.name for each in self.impossible}
        self.devices = tuple(name for name in self.devices if name not in nowhere)

    def _go_on(self) -> None:
        """With the run that the options name: what is done stays as it is.

        Raises:
            CannotResume: see harness.resuming. StoreError.
        """
        self.store.adopt()
        before = resuming.find(self.store, self.run_id)
        resuming.check_subjects(before)
        assert before.request is not None
        for device in before.request.devices:
            self.inventory.device(device)
        self.before, self.devices, self.passed_over = before, before.request.devices, ()
        self.seed, self.started_at = before.seed, before.started_at
        self.done = resuming.done(before.checks)

    def _check_recipes(self) -> None:
        for _, recipe, names in self.further:
            if missing := set(names) - {*self.devices, *(each.name for each in self.impossible)}:
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
            (model, recipe) for model, recipe, names in self.further if not names or device in names
        ]

    def hand_over(self, folder: RunFolder) -> Handover:
        """Open the farm to workers, which find there what they are to share. Slow devices come first.

        Raises:
            InfrastructureError: the farm cannot be opened.
        """
        self.devices = tuple(sorted(self.devices, key=self.effort))
        connection = self.farm.invite()
        self._offer_references(self.recipes.values())
        return Handover(
            run_id=self.run_id,
            started_at=self.started_at,
            seed=self.seed,
            inventory=self.inventory,
            devices=self.devices,
            passed_over=self.passed_over,
            impossible=self.impossible,
            controller=os.getpid(),
            address=connection.address,
            private=not connection.joined,
            folder=str(folder.path),
            done=tuple(sorted(self.done)),
        )

    def begin(self, planned_checks: int, planned_legs: int, not_run: tuple[NotRun, ...] = ()) -> None:
        """The plan is known: from here on the store has the run.

        not_run: those of the planned tests that have no device to run on.
        """
        self.planned_checks, self.planned_legs, self.not_run = planned_checks, planned_legs, not_run
        self.store.begin_run(self.header())
        for device in resuming.second_chance(self.before):
            self.store.add_device(self.run_id, device)
        self.begun = True
        for name in self._identities:
            self._store_device(name)

    def resume(self) -> None:
        """In a worker, before its first test: the store has the run, and knows who is in quarantine."""
        self.begun = True
        for device in self.store.devices(self.run_id):
            if device.quarantined:
                self.recovery.recall(device.name, device.quarantined)
                self._stored.add(device.name)

    # -- what tests use ---------------------------------------------------------------------------

    def cell(self, device: str, recipe_name: str) -> Cell:
        """The cell of one device and recipe; its sessions are opened by the first program."""
        recipe = self.recipes[recipe_name]
        with self._sharing(device):
            self.get_ready(device, recipe)
            spec = self.artifact(self.options.model, recipe).manifest.spec
            reference = self.reference(recipe)
        return Cell(
            device=device,
            recipe=recipe,
            spec=spec,
            reference=reference,
            open_plan=lambda plan: self.session(device, recipe, plan),
            examples=self.options.examples,
            most=share(self.options.examples, self.effort(device), 1),
            seed=self.seed,
            database=str(self.options.cache / "examples"),
            began=datetime.fromisoformat(self.started_at).timestamp(),
            model=str(self.options.model),
            on_program=self._on_program,
            simulated=self.inventory.device(device).kind == SIMULATED,
        )

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
        key = f"{self._test}#{self._legs_of_test}"  # the same when the run is gone on with
        self._legs_of_test += 1
        if (stored := self._stored_legs.get(key)) is not None:
            return stored
        energy = options.energy if energy is None else energy
        plan = LegPlan(
            shape=shape or options.shapes[0],
            repeats=share(options.repeats, self.effort(device), 2),
            seed=self.seed,
            weigh=weigh,
            calibrations=options.cache / "calibrations" if energy else None,
            bandwidth=device not in self._bandwidth_of,
            key=f"{self.run_id}/{device}/{key}",
        )
        what = f"{recipe.name} · {model.name} · {plan.shape.label}"
        take = partial(self._measure, device, model, recipe, plan)
        leg, span = attempt_leg(self.recovery, self.recorder, device, what, take)
        provenance = leg.provenance | {"effort": f"{self.effort(device):g}"}
        leg = dataclasses.replace(leg, provenance=provenance, key=key)
        self.store.add_leg(self.run_id, leg, span)
        if leg.bandwidth is not None:
            self._bandwidth_of.add(device)
        self._to_acknowledge.append((device, plan.key))
        self._acknowledge()
        return leg

    def _acknowledge(self) -> None:
        """What the store has, its lab host may forget."""
        if not self.store.waiting:
            while self._to_acknowledge:
                self.farm.acknowledge(*self._to_acknowledge.pop())

    @cached_property
    def _stored_legs(self) -> dict[str, LegResult]:
        """What an earlier process of this run has measured, by key."""
        return resuming.legs(self.store.results(self.run_id)) if self.options.resume else {}

    def test_begins(self, nodeid: str) -> None:
        """The legs that are measured from now on are this test's."""
        self._test, self._legs_of_test = nodeid, 0

    def _measure(self, device: str, model: Path, recipe: Recipe, plan: LegPlan) -> LegResult:
        self.until_fit(device, again=True)
        with self.working(device):
            self._health.before_work(device)
            subject = Subject(model.name, recipe, self.artifact(model, recipe))
        with self._alone(device):
            identity = self.identity(device)
            return measure_leg(self.farm, identity, subject, plan, self.provenance["commit"], self._on_step)

    def keep(self, check: CheckResult, began: float | None = None, ended: float | None = None) -> None:
        """Store a check's result; durable when this returns. began, ended: Unix times, s; None: now."""
        what, tries = f"{check.recipe} · {check.check}", len(check.retries)
        began = time.time() if began is None else began
        ended = began if ended is None else ended
        span = Span(check.device, "check", what, began, ended, check.outcome, tries)
        self.store.add_check(self.run_id, check, self.recorder.whole(span))
        with logs.about(device=check.device):
            _log.info("%s with %s: %s", check.check, check.recipe, check.outcome)

    def keep_lost_leg(self, device: str, what: str, error: InfrastructureError) -> None:
        """Store why a measurement gave no result."""
        self.keep_lost(f"{device}: {what}: {type(error).__name__}: {error}")

    def keep_lost(self, message: str) -> None:
        """Store what went wrong that belongs to no single check."""
        self.store.add_infrastructure(self.run_id, message)

    def replay_command(self, device: str, recipe_name: str, case: str) -> str:
        words = ["kvfarm", "replay", case, "--devices", device, "--model", str(self.options.model)]
        words += ["--recipe", recipe_name]
        for name, value in (("--farm", self.options.farm), ("--farm-address", self.options.farm_address)):
            words += [name, str(value)] if value else []
        return shlex.join(words)

    # -- what they stand on -----------------------------------------------------------------------

    def effort(self, device: str) -> float:
        """Share in (0, 1] of the programs and repeats asked for that the device gets."""
        return effort_of(self.inventory.device(device))

    @cached_property
    def store(self) -> SpoolingStore:
        worker = self._handover is not None
        spool = self.options.cache / "spool"
        return SpoolingStore(self.options.store, spool, self.run_id, self._on_wait, opened_before=worker)

    def until_fit(self, device: str, again: bool = False) -> None:
        """Lease the device; see Health.until_fit. Not while it keeps others from measuring."""
        self.farm.lease(device)
        try:
            self._health.until_fit(device, again)
        except NotFit:
            with suppress(InfrastructureError):
                self.identity(device)  # the report names who was set aside
            raise

    def tell_wait(self, reason: str) -> None:
        self._on_wait(reason)

    def take_waited(self) -> float:
        """As the base; and until devices were fit."""
        waited, self._health.waited_s = self._health.waited_s, 0.0
        return super().take_waited() + waited

    def ready(self, device: str) -> DeviceIdentity:
        """Who the device is, whose health is known. Raises InfrastructureError: see Health.before_work."""
        self._health.before_work(device)
        return self.identity(device)

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

    def _on_retry(self, device: str, reason: str) -> None:
        self.recorder.instant(device, "retry", reason)
        self._tell_retry(device, reason)

    def _revive(self, device: str, reason: str) -> str:
        has_means = bool(self.inventory.device(device).power_cycle)
        return self.farm.power_cycle(device, reason) if has_means else ""

    def _set_aside(self, device: str, evidence: str) -> None:
        """A device in quarantine: the store says so, and nothing of it is kept open."""
        self.store.add_infrastructure(self.run_id, f"{device} was quarantined: {evidence}")
        self.recorder.quarantine(device, evidence)
        if device in self._identities:
            info = dataclasses.replace(self._info(device), quarantined=evidence.partition("\n")[0])
            self.store.add_device(self.run_id, info)
            self._stored.add(device)
        self._abandon(device)

    def header(self) -> RunResults:
        """The run without its results."""
        return header_of(self)

    def finish(self, complete: bool) -> RunResults:
        """Stop everything; with ``complete`` the run counts as finished, else as interrupted.

        Raises:
            StoreError: not all results are in the store. The run is not finished then, and may be resumed.
        """
        self._acknowledge()
        if not complete:
            self.store.hurry()
        try:
            super().close()
        except InfrastructureError as error:
            self.store.add_infrastructure(self.run_id, f"while stopping: {error}")
        self.recorder.flush()
        self.store.drain()
        self.store.adopt()  # what workers could not deliver
        tell_of_devices(self.store, self.run_id)
        if complete:
            self.store.finish_run(self.run_id, now())
        results = self.store.results(self.run_id)
        if self.options.report is not None:
            from harness.trends import series_of_run  # and its libraries, which workers never need

            self.trend = series_of_run(self.store, results)
        self.close()
        return results

    def close(self) -> None:
        """As the base; what the store has not taken is in its spool, and others may go on with the run."""
        super().close()
        self.recorder.flush()
        store: SpoolingStore | None = self.__dict__.pop("store", None)
        if store is not None:
            store.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
