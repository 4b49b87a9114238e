"""All blocks of a gate: one device after the other where they share a machine, side by side else.

Every leg is in the store before the next begins. The same command after a kill finds its run by the
plan's key, takes what is there and repeats nothing.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import takewhile

from device_agents.api import DeviceIdentity
from device_agents.errors import InfrastructureError
from harness.errors import Quarantined
from harness.farm import Farm
from harness.gate import blocks, weighing
from harness.gate.blocks import CANARY_AFTER, CANARY_BEFORE, POSITIONS, Track
from harness.gate.calibration import known_calibration
from harness.gate.canary import Canary, canary_artifact
from harness.gate.correctness import known_checks
from harness.gate.entry import Entry
from harness.gate.legs import Legs
from harness.gate.outcome import Measured, gate_info
from harness.gate.plan import Plan
from harness.gate.references import Resolved
from harness.legs import LegPlan, attempt_leg
from harness.measuring import Shape
from harness.mutants import score
from harness.provenance import now, provenance
from harness.recovery import Recovery, RecoveryPolicy
from harness.spans import SHORT_S, Recorder
from harness.store.protocol import Span, Store
from harness.store.rows import DRILL, same
from kvengine.artifact import Artifact
from kvengine.codec import decode, encode
from kvengine.errors import KvEngineError
from reports.gate_results import BlockInfo, GateCell, GateInfo, Injection, Place
from reports.results import DeviceInfo, LegResult, RecipeInfo, RunResults

MOST_VOID_IN_A_ROW = 4  # then the device is not fit for this today


@dataclass(frozen=True)
class Watcher:
    """Whom the session tells. on_block: the block, blocks done and to do in this look, s left (or None)."""

    on_step: Callable[[str, int, int], None]
    on_block: Callable[[BlockInfo, int, int, float | None], None]
    on_look: Callable[[GateInfo, int], None]
    on_note: Callable[[str], None]


@dataclass(frozen=True)
class _Bench:
    """What a device is measured with, for as long as the gate goes on."""

    legs: Legs
    entry: Entry
    canary: Canary


class _Stopped(Exception):
    """Another lane failed, or somebody interrupted: this one ends between two legs."""


class GateSession:
    """Runs a plan on an open farm.

    Raises (from ``run``):
        StoreError. What devices and engines do wrong ends up as void blocks, with the reason.
    """

    def __init__(self, plan: Plan, farm: Farm, store: Store, watcher: Watcher) -> None:
        self._store = store
        self._farm = farm
        self._watcher = watcher
        self._lock = threading.Lock()  # guards what lanes share: legs, blocks, gave_up
        self._legs: dict[Track, list[LegResult]] = {}
        self._weighings: dict[Track, list[LegResult]] = {}
        self._blocks: dict[Track, list[BlockInfo]] = {track: [] for track in plan.tracks}
        self._broken: dict[tuple[Track, int], str] = {}
        self._gave_up: dict[Track, str] = {}
        self._devices: dict[str, DeviceInfo] = {}
        self._benches: dict[str, _Bench] = {}
        self._stopping = threading.Event()
        self._settled: set[Track] = set()
        self._decided: dict[str, GateCell] = {}
        self._done_in_look = self._total_in_look = 0
        self._block_s: list[float] = []
        self._provenance = provenance()
        self._recovery = Recovery(farm.vitals, RecoveryPolicy(retries=1), self._set_aside, self._retried)
        self._plan, self._run_id, self._started_at = self._begin(plan)
        self._calibration = known_calibration(store) if plan.kind == "gate" else None
        farm.recorder = Recorder(partial(store.add_span, self._run_id))

    def run(self) -> RunResults:
        """Look after look until all that gates is decided or the last look is over."""
        plan = self._plan
        self._judge(plan.looks[0], 0)  # from here on the store has the run and its plan
        identities = {name: self._identity(name) for name in plan.devices}
        info = self._judge(plan.looks[0], 0)
        canary = canary_artifact(plan.cache)
        for number, needed in enumerate(plan.looks, 1):
            tracks = [t for t in plan.tracks if t not in self._settled and t not in self._gave_up]
            if not tracks:
                break
            self._measure(needed, tracks, identities, canary)
            info = self._judge(needed, number)
            self._settle(info, tracks)
            self._watcher.on_look(info, number)
        if plan.kind == "gate":
            info = replace(info, checked=known_checks(self._store, plan))
        self._farm.recorder.flush()
        finished = now()
        self._store.begin_run(replace(self._header(), gate=info, finished_at=finished))
        if same(info):  # A/A, or a loss found or missed: the calibration has this run from now on
            info = replace(info, calibration=known_calibration(self._store))
            self._store.begin_run(replace(self._header(), gate=info, finished_at=finished))
        self._store.finish_run(self._run_id, finished)
        return self._store.results(self._run_id)

    # -- the run and its store ----------------------------------------------------------------

    def _begin(self, plan: Plan) -> tuple[Plan, str, str]:
        """The run that was killed, with its legs, or a new one."""
        for header in self._store.headers(plan_key=plan.key, finished=False, limit=1):
            legs = self._store.results(header.run_id).legs
            for leg in legs:
                self._file(leg)
            self._watcher.on_note(f"going on with run {header.run_id}: {len(legs)} legs are there already")
            return replace(plan, seed=header.seed), header.run_id, header.started_at
        run_id = f"{now().replace(':', '').replace('+0000', 'Z')}-{secrets.token_hex(4)}"
        return plan, run_id, now()

    def _header(self) -> RunResults:
        plan = self._plan
        recipes = {side.side.recipe: _said(side.artifact) for side in (plan.baseline, plan.candidate)}
        return RunResults(
            run_id=self._run_id,
            started_at=self._started_at,
            finished_at=None,
            command=plan.command,
            seed=plan.seed,
            model=plan.model,
            reference="the baseline, measured live",
            provenance=self._provenance | ({DRILL: plan.drill} if plan.drill else {}),
            devices=(),
            recipes=tuple(RecipeInfo(name, said) for name, said in recipes.items()),
            checks=(),
            legs=(),
            planned_checks=0,
            planned_legs=len(plan.tracks) * plan.looks[0] * 4,
            tags=plan.tags,
            mutation=score.load(plan.cache),
        )

    def _judge(self, needed: int, looks: int) -> GateInfo:
        with self._lock:
            found = Measured(
                {track: tuple(legs) for track, legs in self._legs.items()},
                {track: tuple(legs) for track, legs in self._weighings.items()},
                {track: tuple(read) for track, read in self._blocks.items()},
                self._devices,
                dict(self._gave_up),
                needed,
                looks,
                self._decided,
            )
        info = gate_info(self._plan, found, self._calibration, datetime.now(UTC).date())
        self._store.begin_run(replace(self._header(), gate=info))
        return info

    def _settle(self, info: GateInfo, tracks: Iterable[Track]) -> None:
        """Decisions stand from now on; a track is done when nothing that more blocks could tell is open."""
        for cell in info.cells:
            if not cell.exact and cell.verdict in ("PASS", "REGRESSED"):
                self._decided.setdefault(cell.id, cell)
        for track in tracks:
            mine = [
                cell
                for cell in info.cells
                if cell.comparison == track.comparison
                and cell.workload == track.workload
                and (cell.device == track.device or cell.units)
                and not cell.exact
            ]
            open_ = [cell for cell in mine if cell.gating or self._plan.kind == "calibration"]
            if not any(cell.verdict in ("INCONCLUSIVE", "INVALID") for cell in open_):
                self._settled.add(track)

    def _identity(self, name: str) -> DeviceIdentity | None:
        try:
            found = self._farm.identity(name)
        except InfrastructureError as error:
            self._store.add_infrastructure(self._run_id, f"{name}: {error}")
            self._give_up([t for t in self._plan.tracks if t.device == name], str(error))
            return None
        self._devices[name] = decode(DeviceInfo, encode(found))
        self._store.add_device(self._run_id, self._devices[name])
        return found

    # -- measuring -----------------------------------------------------------------------------

    def _measure(
        self, needed: int, tracks: list[Track], identities: dict[str, DeviceIdentity | None], canary: Artifact
    ) -> None:
        """Bring every track to ``needed`` valid blocks, or give it up."""
        lanes: dict[str, list[DeviceIdentity]] = {}
        for name in dict.fromkeys(track.device for track in tracks):
            if identity := identities[name]:
                lanes.setdefault(_lane(identity), []).append(identity)
                if name not in self._benches:
                    self._benches[name] = self._bench(identity, canary)
        with self._lock:
            self._done_in_look = 0
            self._total_in_look = sum(max(0, needed - self._valid(t)) for t in tracks)
        with ThreadPoolExecutor(max(1, len(lanes)), "lane") as pool:
            try:
                futures = [pool.submit(self._run_lane, lane, needed, tracks) for lane in lanes.values()]
                for future in futures:
                    future.result()
            except BaseException:
                self._stopping.set()  # the lanes end with the legs that are running
                raise

    def _bench(self, identity: DeviceIdentity, canary: Artifact) -> _Bench:
        device, plan = identity.name, self._plan
        return _Bench(
            legs=Legs(self._farm, identity, self._provenance["commit"], plan.cache, self._watcher.on_step),
            entry=Entry(
                lambda: self._farm.vitals(device),
                plan.settings.entry,
                busy=identity.kind == "host",
                pause=self._pause,
            ),
            canary=Canary(self._farm, device, canary),
        )

    def _run_lane(self, devices: list[DeviceIdentity], needed: int, tracks: list[Track]) -> None:
        for identity in devices:
            bench = self._benches[identity.name]
            try:
                self._on_device(bench, needed, [t for t in tracks if t.device == identity.name])
            finally:
                bench.canary.close()

    def _on_device(self, bench: _Bench, needed: int, tracks: list[Track]) -> None:
        try:
            for track in tracks:
                self._weigh(track, bench, needed)
        except _Stopped:
            return
        except Quarantined as error:
            self._give_up(tracks, str(error))
            return
        while open_ := [t for t in tracks if t not in self._gave_up and self._valid(t) < needed]:
            # The track with the fewest blocks: comparisons and workloads take turns.
            track = min(open_, key=self._tried)
            index = self._tried(track)
            new = len(self._block_legs(track, index)) < len(POSITIONS)
            try:
                self._rest(track, bench)
                began = time.monotonic()
                self._block(track, index, bench)
            except _Stopped:
                return
            except Quarantined as error:
                self._give_up(tracks, str(error))
                return
            except InfrastructureError as error:
                self._break_off(track, index, str(error))
            except KvEngineError as error:
                self._break_off(track, index, str(error))
                self._give_up([track], f"the engine refused: {error}")
            self._block_done(track, index, needed, time.monotonic() - began, new)

    def _rest(self, track: Track, bench: _Bench) -> None:
        """After void blocks, before the next: a machine that is disturbed now may not be in a minute."""
        void = sum(1 for _ in takewhile(lambda block: block.reasons, reversed(self._blocks[track])))
        if seconds := bench.entry.rest_s(void):
            self._watcher.on_note(f"{track.device} is disturbed: the next block starts in {seconds:.0f} s")
            with self._farm.recorder.doing(track.device, "wait", "after a void block"):
                bench.entry.rest(seconds)

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise _Stopped

    def _block(self, track: Track, index: int, bench: _Bench) -> None:
        """The legs of one block that are not there yet, each stored before the next."""
        order = blocks.order(self._plan.seed, track, index)
        there = self._block_legs(track, index)
        for position in POSITIONS:
            if position in there:
                continue
            if self._stopping.is_set():
                raise _Stopped
            place = Place(track.comparison, track.workload, index, position, blocks.arm_at(order, position))
            # What cannot save the block any more is not waited for.
            spoiled = any(leg.place and leg.place.given_up for leg in there.values())
            take = partial(self._take, bench, place, not spoiled)
            what = f"block {index + 1} · {place.arm} · {track.workload}"
            there[position] = self._attempt(track.device, what, take)

    def _attempt(self, device: str, what: str, take: Callable[[], LegResult]) -> LegResult:
        """A leg, kept."""
        leg, span = attempt_leg(self._recovery, self._farm.recorder, device, what, take)
        self._keep(leg, span)
        return leg

    def _take(self, bench: _Bench, place: Place, patient: bool) -> LegResult:
        if place.position in (CANARY_BEFORE, CANARY_AFTER):
            return bench.legs.take_canary(bench.canary, place)
        side, how = self._how(Track(bench.legs.device, place.comparison, place.workload), place)
        with self._farm.recorder.doing(bench.legs.device, "wait", "until it is fit", SHORT_S):
            waited = bench.entry.wait(patient)
        return bench.legs.take(side, how, place, waited)

    def _how(self, track: Track, place: Place) -> tuple[Resolved, LegPlan]:
        """Which side the leg at ``place`` is of, and how it is taken."""
        plan = self._plan
        chosen = plan.workload(place.workload)
        how = LegPlan(
            shape=Shape(chosen.prompt, chosen.new_tokens, chosen.depth),
            repeats=chosen.repeats,
            seed=plan.seed,
            weigh=False,  # memory has a pass of its own
            calibrations=plan.cache / "calibrations" if plan.energy else None,
            looked=True,  # by the entry condition
            bandwidth=self._tells_bandwidth(track, place),
            key=self._leg_key(track.device, place),
        )
        if place.arm != "candidate":
            return plan.baseline, how
        injection = plan.comparison(place.comparison).injection
        if injection != Injection():
            ballast = round(injection.memory * self._baseline_rss(track))
            how = replace(how, slowdown=injection.slowdown, ballast_bytes=ballast)
        return plan.candidate, how

    def _tells_bandwidth(self, track: Track, place: Place) -> bool:
        """Once a device: after the last leg of its first block, where it disturbs least."""
        first = next(each for each in self._plan.tracks if each.device == track.device)
        return (track, place.block, place.position) == (first, 0, 3)

    def _weigh(self, track: Track, bench: _Bench, pairs: int) -> None:
        """Bring the track to ``pairs`` of weighings; none more where its memory is decided."""
        if self._memory_is_decided(track):
            return
        for pair in range(weighing.MOST_TRIED * pairs):
            with self._lock:
                there = tuple(self._weighings.get(track, ()))
            if len(weighing.data(there)) >= pairs or track in self._gave_up:
                return
            known = {leg.place.arm for leg in there if leg.place and leg.place.block == pair}
            try:
                for position, arm in zip(weighing.POSITIONS, weighing.order(pair), strict=True):
                    if arm not in known:
                        place = Place(track.comparison, track.workload, pair, position, arm)
                        self._weigh_one(track, bench, place, pairs)
            except Quarantined:
                raise
            except InfrastructureError as error:
                text = f"{track.device}: weighing {pair + 1} of {track.workload}: {error}"
                self._store.add_infrastructure(self._run_id, text)
            except KvEngineError as error:
                self._give_up([track], f"the engine refused: {error}")

    def _memory_is_decided(self, track: Track) -> bool:
        key = track.device, track.comparison, track.workload, "memory"
        decided = self._decided.values()
        return any((c.device, c.comparison, c.workload, c.metric) == key for c in decided)

    def _weigh_one(self, track: Track, bench: _Bench, place: Place, pairs: int) -> None:
        if self._stopping.is_set():
            raise _Stopped
        side, how = self._how(track, place)
        self._watcher.on_step(f"weighing {track.device}", place.block, pairs)
        what = f"weighing {place.block + 1} · {place.arm} · {track.workload}"
        self._attempt(track.device, what, partial(bench.legs.weigh, side, how, place))

    def _baseline_rss(self, track: Track) -> int:
        """What the baseline weighs on this device, by its first weighing; 0 where there is none."""
        with self._lock:
            legs = self._weighings.get(track, ())
            return next((x.peak_rss_bytes for x in legs if x.place and x.place.arm == "baseline"), 0)

    def _leg_key(self, device: str, place: Place) -> str:
        where = place.comparison, place.workload, str(place.block), str(place.position)
        return "/".join((self._run_id, device, *where))

    def _keep(self, leg: LegResult, span: Span) -> None:
        self._store.add_leg(self._run_id, leg, span)
        if leg.place is not None:
            self._farm.acknowledge(leg.device, self._leg_key(leg.device, leg.place))
        with self._lock:
            self._file(leg)

    def _file(self, leg: LegResult) -> None:
        if leg.place is not None:
            track = Track(leg.device, leg.place.comparison, leg.place.workload)
            (self._weighings if leg.memory_pass else self._legs).setdefault(track, []).append(leg)

    # -- what went wrong -----------------------------------------------------------------------

    def _break_off(self, track: Track, index: int, reason: str) -> None:
        text = f"{track.device}: block {index + 1} of {track.workload}: {reason}"
        self._store.add_infrastructure(self._run_id, text)
        with self._lock:
            self._broken[track, index] = reason

    def _give_up(self, tracks: Iterable[Track], reason: str) -> None:
        with self._lock:
            for track in tracks:
                self._gave_up.setdefault(track, reason)

    def _set_aside(self, device: str, evidence: str) -> None:
        self._store.add_infrastructure(self._run_id, f"{device} was quarantined: {evidence}")
        self._farm.recorder.quarantine(device, evidence)
        sentence = evidence.partition("\n")[0]
        if device in self._devices:
            self._devices[device] = replace(self._devices[device], quarantined=sentence)
            self._store.add_device(self._run_id, self._devices[device])
        self._give_up([t for t in self._plan.tracks if t.device == device], f"quarantined: {sentence}")

    def _retried(self, device: str, reason: str) -> None:
        self._farm.recorder.instant(device, "retry", reason)
        self._watcher.on_note(f"{device}: again, after {reason}")

    # -- bookkeeping ---------------------------------------------------------------------------

    def _block_done(self, track: Track, index: int, needed: int, seconds: float, new: bool) -> None:
        """The block is over, valid or not. new: it was measured just now, not by a killed run."""
        order = blocks.order(self._plan.seed, track, index)
        legs = self._block_legs(track, index)
        with self._lock:
            block = blocks.read(track, index, order, legs, self._broken.get((track, index), ""))
            self._blocks[track].append(block)
            self._done_in_look += not block.reasons
            self._block_s += [seconds] if new else []
            done, total = self._done_in_look, self._total_in_look
            mean_s = sum(self._block_s) / max(1, len(self._block_s))
        if new:
            self._watcher.on_block(block, done, total, (total - done) * mean_s)
        recent = self._blocks[track][-MOST_VOID_IN_A_ROW:]
        tried, valid = self._tried(track), self._valid(track)
        if len(recent) == MOST_VOID_IN_A_ROW and all(b.reasons for b in recent):
            why = recent[-1].reasons[0]
            self._give_up([track], f"{MOST_VOID_IN_A_ROW} blocks in a row were void, the last: {why}")
        elif tried >= 2 * needed and valid < needed:
            self._give_up([track], f"{tried} blocks were tried, {valid} of them valid")

    def _block_legs(self, track: Track, index: int) -> dict[int, LegResult]:
        """By position."""
        with self._lock:
            legs = self._legs.get(track, ())
            return {leg.place.position: leg for leg in legs if leg.place and leg.place.block == index}

    def _tried(self, track: Track) -> int:
        """Blocks that are over; the next one has this index, maybe with legs from before a kill."""
        return len(self._blocks[track])

    def _valid(self, track: Track) -> int:
        return sum(not block.reasons for block in self._blocks[track])


def _lane(identity: DeviceIdentity) -> str:
    """Devices of one lane are measured one after the other: those that share a machine's cores."""
    return identity.name if identity.kind == "android" and not identity.simulated else "this machine"


def _said(artifact: Artifact) -> dict[str, str]:
    recipe = artifact.manifest.recipe
    return {
        "artifact": artifact.id,
        "weights": recipe.weights,
        "cache": recipe.cache.kind,
        "cache dtype": recipe.cache.dtype,
    }
