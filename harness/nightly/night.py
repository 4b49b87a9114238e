"""One night: its parts one after the other, kept after each; the same command goes on after a kill."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError
from device_agents.locking import locked
from harness import choosing, inventory
from harness.gate import settings as gate_settings
from harness.gate import waivers
from harness.gate.calibration import known_calibration
from harness.gate.plan import looks_up_to, must_fit
from harness.gate.references import Report, Resolved, resolve
from harness.gate.session import Watcher
from harness.nightly import discover, drill, outputs
from harness.nightly.calibrate import Calibrate
from harness.nightly.check import Check
from harness.nightly.errors import NightError
from harness.nightly.gate import Gate
from harness.nightly.journal import Entry, Journal, again
from harness.nightly.measure import Measure
from harness.nightly.parts import Found, Night, Part
from harness.nightly.settings import NightSettings
from harness.provenance import now, provenance
from harness.recipes import parse_recipes
from harness.store.protocol import Store
from harness.tags import tags_of
from kvengine.codec import encode
from kvengine.errors import RecipeError
from reports import gate_view
from reports.gate_night import NightInfo, NightPart
from reports.text import seconds

ALL: tuple[Part, ...] = (Calibrate(), Check(), Measure(), Gate())
FOLDER = "nights"  # of journals, in the cache


@dataclass(frozen=True)
class Prepared:
    """What is known before any device is asked."""

    settings: NightSettings
    config: Path
    rules: gate_settings.GateSettings
    rules_from: str
    waivers: tuple[waivers.Waiver, ...]
    baseline: Resolved
    candidate: Resolved

    @property
    def key(self) -> str:
        """Equal for what is the same night: a killed one goes on with the same settings, sides and code."""
        said = {
            "settings": encode(self.settings),
            "rules": encode(self.rules),
            "sides": [[s.artifact.id, encode(s.session)] for s in (self.baseline, self.candidate)],
            "commit": provenance()["commit"],
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def prepare(settings: NightSettings, config: Path, cache: Path, store: Store, report: Report) -> Prepared:
    """Read what nightly.toml names and export both sides; refuses what cannot become a night.

    Raises:
        HarnessError, KvEngineError: what was sought, what was found.
    """
    files, model = settings.gate, Path(settings.model)
    drill.check(settings)
    tags_of(filter(None, [settings.tag]))
    rules, source = gate_settings.load(Path(files.settings) if files.settings else None)
    looks_up_to(rules, files.blocks)
    allowed = waivers.load(Path(files.waivers) if files.waivers else None, datetime.now(UTC).date())
    choosing.read(settings.devices, _inventory(settings))
    baseline = resolve(settings.baseline, model, cache, store, report)
    with drill.applied(settings.drill):
        candidate = resolve(settings.candidate, model, drill.cache_of(cache, settings.drill), store, report)
    must_fit(baseline, candidate, rules)
    _must_be_recipes(settings, candidate)
    return Prepared(settings, config, rules, source, allowed, baseline, candidate)


class NightSession:
    """Runs what was prepared.

    on_note: a line for who watches. parts: of which the settings choose.

    Raises (from ``run``):
        HarnessError: another night of this folder is at work, the store fails. OSError: no room for reports.
    """

    def __init__(
        self,
        prepared: Prepared,
        cache: Path,
        store: Store,
        watcher: Watcher,
        command: str,
        parts: Sequence[Part] = ALL,
    ) -> None:
        self._prepared, self._cache, self._store = prepared, cache, store
        self._watcher, self._command = watcher, command
        self._parts = [part for part in parts if part.name in prepared.settings.parts]
        self._journal = Journal(cache / FOLDER)
        self._report = Path(prepared.settings.report)

    def run(self) -> NightInfo:
        with _alone(self._cache / FOLDER):
            entry = self._begin()
            self._keep(entry)
            night, entry = self._discover(entry)
            if night is not None:
                for part in self._parts:
                    entry = self._part(part, night, entry)
            return self._end(entry)

    # -- its parts ---------------------------------------------------------------------------------

    def _begin(self) -> Entry:
        """The night that was killed, or a new one."""
        prepared, settings = self._prepared, self._prepared.settings
        found = self._journal.unfinished(prepared.key)
        if found is not None:
            done = ", ".join(part.name for part in found.night.parts) or "nothing"
            self._watcher.on_note(f"going on with night {found.night.night}: done already: {done}")
            return again(found)
        night = NightInfo(
            night=f"{now().replace(':', '').replace('+0000', 'Z')}-{secrets.token_hex(4)}",
            name=settings.name,
            started_at=now(),
            finished_at=None,
            command=self._command,
            config=str(prepared.config),
            model=prepared.baseline.model,
            baseline=settings.baseline,
            candidate=settings.candidate,
            planned=tuple(part.name for part in self._parts),
            drill=drill.told(settings.drill),
            provenance=provenance(),
        )
        return Entry(prepared.key, night)

    def _discover(self, entry: Entry) -> tuple[Night | None, Entry]:
        """None where nobody answers: there is nothing to do tonight."""
        settings, prepared = self._prepared.settings, self._prepared
        meant = choosing.read(settings.devices, _inventory(settings))
        if entry.chosen:
            found = discover.again(meant, entry.chosen, entry.night.devices)
        else:
            self._watcher.on_note("asking the devices who they are")
            try:
                found = discover.discover(meant, settings.farm_address)
            except InfrastructureError as error:
                return None, self._lost(entry, str(error))
            entry = replace(entry, chosen=found.names, night=replace(entry.night, devices=found.devices))
            self._keep(entry)
        if not found.anybody:
            return None, self._lost(entry, "no device answers")
        return Night(
            settings=settings,
            rules=prepared.rules,
            rules_from=prepared.rules_from,
            waivers=prepared.waivers,
            baseline=prepared.baseline,
            candidate=prepared.candidate,
            inventory=found.inventory,
            devices=found.names,
            store=self._store,
            cache=self._cache,
            command=self._command,
            drill=entry.night.drill,
            watcher=self._watcher,
        ), entry

    def _part(self, part: Part, night: Night, entry: Entry) -> Entry:
        """``part`` done and kept; at once where it was done before a kill."""
        if any(done.name == part.name for done in entry.night.parts):
            return entry
        number = [each.name for each in self._parts].index(part.name) + 1
        left = self._left(part.name)
        self._watcher.on_note(f"part {number} of {len(self._parts)}: {part.title}{left}")
        folder = self._report / entry.night.night / part.name
        folder.mkdir(parents=True, exist_ok=True)
        started, began = now(), time.monotonic()
        try:
            found = part.run(night, folder)
        except InfrastructureError as error:
            found = Found("INVALID", "It could not be done", _first_line(error), page=False)
        return self._add(entry, part, found, started, time.monotonic() - began)

    def _add(self, entry: Entry, part: Part, found: Found, started: str, took_s: float) -> Entry:
        told = NightPart(
            name=part.name,
            title=part.title,
            word=found.word,
            headline=found.headline,
            sentence=found.sentence,
            remarks=found.remarks,
            decides=part.decides,
            run_id=found.run_id,
            page=f"{part.name}/index.html" if found.page else "",
            started_at=started,
            seconds=took_s,
        )
        night = replace(entry.night, parts=(*entry.night.parts, told), calibration=self._calibration())
        entry = replace(entry, night=night)
        self._keep(entry)
        self._watcher.on_note(f"{part.title}: {found.word}. {found.headline}: {found.sentence}")
        return entry

    def _lost(self, entry: Entry, why: str) -> Entry:
        """Nothing can be done tonight; every part that is not done says so."""
        done = {part.name for part in entry.night.parts}
        for part in self._parts:
            if part.name not in done:
                found = Found("INVALID", "No device could be used", f"{why}.", page=False)
                entry = self._add(entry, part, found, now(), 0.0)
        return entry

    def _end(self, entry: Entry) -> NightInfo:
        entry = replace(entry, night=replace(entry.night, finished_at=now()))
        self._keep(entry)
        outputs.append_step_summary(entry.night, self._report)
        return entry.night

    # -- what is kept ------------------------------------------------------------------------------

    def _keep(self, entry: Entry) -> None:
        """The journal first: what it has is not done again. Then the pages as they stand."""
        self._journal.keep(entry)
        outputs.write(entry.night, self._journal.history(entry.night.name), self._report)

    def _calibration(self) -> str:
        return gate_view.calibration_sentence(known_calibration(self._store))

    def _left(self, name: str) -> str:
        """By how long the newest night of this name took for this part and those after it."""
        nights = [n for n in self._journal.history(self._prepared.settings.name) if n.finished_at]
        if not nights:
            return ""
        took = {part.name: part.seconds for part in nights[-1].parts}
        names = [each.name for each in self._parts]
        rest = names[names.index(name) :]
        if not set(rest) <= set(took):
            return ""
        return f", about {seconds(sum(took[each] for each in rest))} left to the night"


def _must_be_recipes(settings: NightSettings, candidate: Resolved) -> None:
    """The suite exports by itself, so it needs to know how. Raises NightError."""
    for part, recipes in (("check", settings.check.recipes), ("measure", settings.measure.recipes)):
        if part not in settings.parts:
            continue
        try:
            parse_recipes(recipes or candidate.side.recipe)
        except RecipeError as error:
            raise NightError(
                f"{part}.recipes: sought recipes, for the candidate is {settings.candidate!r}: {error}"
            ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two nights in one folder would measure each other. The lock ends with its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "night.lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, Deadline(1.0)))
        except DeadlineExceeded as error:
            raise NightError(f"another night is at work here; `lsof {lock}` says who") from error
        yield


def _inventory(settings: NightSettings) -> inventory.Inventory:
    return inventory.load(Path(settings.farm) if settings.farm else None)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
