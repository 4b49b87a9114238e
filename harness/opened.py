"""What a run over devices opens when it is first needed, and closes: farm, sessions, artifacts, reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.locking import locked
from harness.artifacts import artifact_of
from harness.device_session import DeviceSession
from harness.farm import LOCAL_ROOT, Farm
from harness.handover import Handover
from harness.inventory import Inventory
from harness.lab import leases_folder
from harness.quiet import WAIT_S, Quiet
from harness.recipes import ForeignModel, Recipe, with_plan
from harness.reference import Reference, begin_reference, offer_reference, share_reference
from harness.reference.rounded import is_exact, rounded_checkpoint
from harness.run_options import RunOptions
from harness.spans import SHORT_S, recording_nothing
from kvengine.artifact import Artifact
from kvengine.plan import PlanKind
from kvengine.recipe import ExportRecipe
from kvengine.session import EngineSession


class Opened:
    """The base of a run, which says who its devices are. handover: see DeviceRun."""

    run_id: str
    inventory: Inventory
    devices: tuple[str, ...]

    def __init__(
        self,
        options: RunOptions,
        on_step: Callable[[str, int, int], None],
        on_wait: Callable[[str], None],
        handover: Handover | None,
    ) -> None:
        self.options = options
        self._handover = handover
        self._on_step = on_step
        self._on_wait = on_wait
        self._sessions: dict[tuple[str, str, str], DeviceSession] = {}
        self._references: dict[Path, Reference] = {}
        self._coming: dict[Path, Callable[[], Reference]] = {}  # begun, and not yet waited for
        self._got_ready = False
        self._artifacts: dict[tuple[Path, ExportRecipe, ForeignModel | None], Artifact] = {}
        self._offered: list[object] = []  # references that end when they are forgotten
        self._quiet: dict[str, Quiet] = {}  # by lab host
        self._farm: Farm | None = None
        self.recorder = recording_nothing()

    @property
    def farm(self) -> Farm:
        """The farm, started at first use, with every selected device's identity stored."""
        if self._farm is None:
            self._on_step("starting the farm", 0, 0)
            if (shared := self._handover) is not None:
                root = LOCAL_ROOT if shared.private else None
                farm = self._farm_of(shared.address, root, guest=True)
            else:
                farm = self._farm_of(self.options.farm_address)
            farm.__enter__()
            self._farm = farm
        return self._farm

    def _farm_of(self, address: str | None, root: Path | None = None, *, guest: bool = False) -> Farm:
        return Farm(
            self.inventory,
            self.devices,
            address,
            root=root,
            guest=guest,
            terms=dataclasses.replace(self.options.terms, run=self.run_id),
            on_wait=self._on_wait,
            recorder=self.recorder,
        )

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
                else (self._coming.pop(checkpoint, None) or begin_reference(checkpoint))()
            )
        return self._references[checkpoint]

    def get_ready(self, device: str, recipe: Recipe) -> None:
        """Begin what the first test waits for: its device and the reference get ready while we export."""
        if self._got_ready:
            return
        self._got_ready = True
        self.farm.get_ready(device)
        if not self._handover and _judged_exactly(recipe):
            self._coming[self.options.model] = begin_reference(self.options.model)

    def _offer_references(self, recipes: Iterable[Recipe]) -> None:
        """For all workers of this run to share, until it closes."""
        names = {self._reference_name(r): self.options.model if _judged_exactly(r) else None for r in recipes}
        self._offered = [offer_reference(name, model) for name, model in sorted(names.items())]

    def _reference_name(self, recipe: Recipe) -> str:
        """Of the actor that all workers of this run share; one for each set of weights."""
        export = recipe.export
        weights = "exact" if _judged_exactly(recipe) else f"{export.weights}-{export.block_size}"
        return f"reference-{self.run_id}-{weights}"

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

    def _abandon(self, device: str) -> None:
        """Forget the sessions of a device that does not answer; to close one would mean to wait for it."""
        for key in [key for key in self._sessions if key[0] == device]:
            self._sessions.pop(key)

    def give_back(self, device: str) -> None:
        """Nothing more is to be done on the device: others may have it."""
        for key in [key for key in self._sessions if key[0] == device]:
            self._sessions.pop(key).close()
        if self._farm is not None:
            self._farm.give_back(device)

    @contextmanager
    def working(self, device: str) -> Iterator[None]:
        """The device is ours, and while the body runs none is measured that its work would disturb."""
        # In this order: who keeps others from measuring must not wait for a lease that one of them has.
        self.farm.lease(device)
        with self._sharing(device):
            yield

    @contextmanager
    def _sharing(self, device: str) -> Iterator[None]:
        """While the body runs no device is measured that this one's work would disturb."""
        with ExitStack() as stack:
            self._wait_for(device, lambda quiet: stack.enter_context(quiet.shared()))
            yield

    @contextmanager
    def _alone(self, device: str) -> Iterator[None]:
        """The device is ours, and while the body runs none works that would disturb its measurement."""
        self.farm.lease(device)
        with ExitStack() as stack:
            self._wait_for(device, lambda quiet: stack.enter_context(quiet.alone()))
            yield

    def _wait_for(self, device: str, enter: Callable[[Quiet], object]) -> None:
        quiet = self._quiet_of(device)
        if quiet is not None:
            with self.recorder.doing(device, "wait", "for the machine's other devices", SHORT_S):
                enter(quiet)

    def take_waited(self) -> float:
        """Seconds waited for other devices, and in line for leases, since the last call."""
        waiting: list[Quiet | Farm] = [*self._quiet.values(), *([self._farm] if self._farm else [])]
        waited = sum(each.waited_s for each in waiting)
        for each in waiting:
            each.waited_s = 0.0
        return waited

    def _quiet_of(self, device: str) -> Quiet | None:
        """None where the device computes by itself."""
        entry = self.inventory.device(device)
        if not entry.shares_cpu:
            return None
        if entry.lab not in self._quiet:
            # Where the leases are: other runs work on this machine too.
            self._quiet[entry.lab] = Quiet(
                leases_folder() / "quiet" / entry.lab,
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

    def close(self) -> None:
        """Close sessions, give devices back, stop Ray if this run started it."""
        self._sessions.clear()
        self._references.clear()
        self._coming.clear()
        self._offered.clear()
        if self._farm is not None:
            self._farm.__exit__(None, None, None)
            self._farm = None


def _judged_exactly(recipe: Recipe) -> bool:
    """Whether the reference is the checkpoint itself, unrounded."""
    return recipe.foreign is not None or is_exact(recipe.export)
