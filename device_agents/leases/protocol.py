"""The rules of leases, pure: no clock, no files. A command and the time give facts; facts change the state.

Who is next: the higher priority, where waiting ``ageing_s`` is worth one step, so that nobody starves behind
a stream of more important work; then the user who used fewer devices lately (device-seconds, halved every
``half_life_s``), then the fewer now; then who came first.

A request gets all its devices at once or none, so nobody holds one while it waits for another: no deadlock.
Free devices that it waits for are kept for it from all who are behind it in line: no big request starves
because of small ones. The price is that such devices idle until the others of its set are free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import TypeVar

from device_agents.errors import LeaseError, LeaseNotGranted
from device_agents.leases.model import (
    Asked,
    Beat,
    Booted,
    Drained,
    Ended,
    Fact,
    Facts,
    Freed,
    Granted,
    Held,
    How,
    Lifted,
    Process,
    Quarantine,
    Quarantined,
    Request,
    Restart,
    Restarted,
    Rules,
    Snapshot,
    Started,
    State,
    Waiting,
    Withdrawn,
)

_DAY_S = 24 * 3600.0
V = TypeVar("V")
Command = Callable[[State, float], Facts]
"""What a state and the time now make of something that is wanted."""


# -- commands: what may be done in a state, and so which facts it gives -------------------------------


def ask(request: Request, rules: Rules, *, wait: bool) -> Command:
    """Get in line. The same request again is but a sign of life.

    The command raises LeaseNotGranted: it cannot be granted now, and is not to wait. LeaseError: nor ever.
    """

    def command(state: State, now: float) -> Facts:
        known = state.waiting.get(request.id) or next(iter(state.of(request.id)), None)
        if known is not None:
            # Whoever waits asks often; not each time needs a line in the journal.
            return (Beat(request.id),) if now - known.beat > known.request.beat_s / 4 else ()
        _check(request, rules)
        asked: Facts = (Asked(request),)
        then = fold(state, now, asked, rules)
        if not wait and not fold(then, now, grants(then, now, rules), rules).of(request.id):
            raise LeaseNotGranted("; ".join(why_not(then, request.id, now, rules)))
        return asked

    return command


def beat(id_: str, rules: Rules, beat_s: float | None = None) -> Command:
    """A sign of life, of a lease or of one who waits. beat_s: the next comes within; None: as before.

    The command raises LeaseError: neither is there.
    """

    def command(state: State, now: float) -> Facts:
        if id_ not in state.waiting and not state.of(id_):
            raise LeaseError(f"request {id_} neither waits nor holds a device any more; ask again")
        if beat_s is not None:
            _check_beat(beat_s, rules)
        return (Beat(id_, beat_s),)

    return command


def withdraw(id_: str, why: str) -> Command:
    """Wait no more, or give back all that was granted."""

    def command(state: State, _: float) -> Facts:
        waits: Facts = (Withdrawn(id_, why),) if id_ in state.waiting else ()
        return waits + tuple(Ended(held.device, held.token, why) for held in state.of(id_))

    return command


def end(device: str, token: int, why: str) -> Command:
    """End one device's lease, if it still is that of ``token``."""

    def command(state: State, _: float) -> Facts:
        held = state.held.get(device)
        ours = held is not None and held.token == token and not held.ended
        return (Ended(device, token, why),) if ours else ()

    return command


def freed(device: str, token: int) -> Command:
    """Nothing runs on the device any more, after its lease has ended."""

    def command(state: State, _: float) -> Facts:
        held = state.held.get(device)
        ours = held is not None and held.token == token and held.ended
        return (Freed(device, token),) if ours else ()

    return command


def quarantine(device: str, evidence: str, by: str, seconds: float | None) -> Command:
    """Grant the device to nobody; whoever has it loses it."""

    def command(state: State, _: float) -> Facts:
        held = state.held.get(device)
        why = f"{device} was quarantined by {by}: {evidence}"
        lost: Facts = (Ended(device, held.token, why),) if held and not held.ended else ()
        return (Quarantined(device, evidence, by, seconds), *lost)

    return command


def lift(device: str, by: str) -> Command:
    """Undo a quarantine."""
    return lambda state, _: (Lifted(device, by),) if device in state.quarantined else ()


def restart(device: str, how: How, by: str, why: str, most: int) -> Command:
    """Start the device anew, for the ``most``th time of the last 24 hours at most.

    The command raises LeaseError: that often it was already.
    """

    def command(state: State, now: float) -> Facts:
        past = [each for each in _today(state, device, now) if each.how == how]
        if len(past) >= most:
            raise LeaseError(
                f"{device}: {how} {len(past)} times in the last 24 h, at most {most} are allowed; see to it"
            )
        return (Restarted(device, how, by, why),)

    return command


def drain(by: str, why: str) -> Command:
    """Grant nothing at this lab host from now on; with ``why`` "" grant again."""

    def command(state: State, _: float) -> Facts:
        told = Drained(by, why)
        return () if _drained(told) == state.drained else (told,)

    return command


def start(agent: str, process: Process) -> Command:
    """A lab agent starts: what had ended on its devices is clean now, the rest goes on."""

    def command(state: State, _: float) -> Facts:
        ended = [h for h in state.held.values() if h.request.agent == agent and h.ended]
        return (Started(agent, process), *(Freed(h.device, h.token) for h in ended))

    return command


def stop(agent: str) -> Command:
    """A lab agent ends: nobody has a device through it any more, or waits for one."""

    def command(state: State, _: float) -> Facts:
        why = "its lab agent was stopped"
        ours = [h for h in state.held.values() if h.request.agent == agent and not h.ended]
        waiting = [w.request.id for w in state.waiting.values() if w.request.agent == agent]
        return (*(Withdrawn(id_, why) for id_ in waiting), *(Ended(h.device, h.token, why) for h in ours))

    return command


def died(is_dead: Callable[[Process], bool]) -> Command:
    """What ends because the process that asked, or the agent that did the work, is gone."""

    def command(state: State, _: float) -> Facts:
        @cache  # most leases are of one client
        def gone(process: Process | None) -> bool:
            return process is not None and is_dead(process)

        why = "its process is gone"
        waiting = [w.request.id for w in state.waiting.values() if gone(w.request.client)]
        ending = [h for h in state.held.values() if not h.ended and gone(h.request.client)]
        # What ran for them ended with their agent.
        clean = [
            h
            for h in state.held.values()
            if (h.ended or h in ending) and gone(state.agents.get(h.request.agent))
        ]
        return (
            *(Withdrawn(id_, why) for id_ in waiting),
            *(Ended(h.device, h.token, why) for h in ending),
            *(Freed(h.device, h.token) for h in clean),
        )

    return command


# -- what happens by itself ---------------------------------------------------------------------------


def due(state: State, now: float) -> Facts:
    """What time alone ends: silent and overlong leases, those who wait and are silent, quarantines."""
    silent = [w.request for w in state.waiting.values() if now >= w.beat + w.request.beat_s]
    lifted = [d for d, q in state.quarantined.items() if q.until is not None and now >= q.until]
    return (
        *(Ended(h.device, h.token, why) for h in state.held.values() if (why := _over(h, now))),
        *(Withdrawn(request.id, f"no heartbeat for {request.beat_s:g} s") for request in silent),
        *(Lifted(device, "its time is over") for device in lifted),
    )


def grants(state: State, now: float, rules: Rules) -> Facts:
    """Everything that can be granted now."""
    facts: list[Fact] = []
    for state_then, waiting, devices, _ in _line(state, now, rules):
        if devices:
            facts.append(Granted(waiting.request.id, state_then.token + 1, devices))
    return tuple(facts)


def current(state: State, device: str, token: int, now: float) -> Held:
    """The lease of ``token``.

    Raises:
        LeaseError: it is not the current one.
    """
    held = state.held.get(device)
    if held is None or (held.token == token and held.ended):
        raise LeaseError(f"{device}: token {token} has no lease any more; acquire the device again")
    if held.token != token:
        raise LeaseError(
            f"{device}: token {token} is not the current one; it is leased to {held.request.holder!r}"
        )
    if why := _over(held, now):
        raise LeaseError(f"{device}: the lease of token {token} has just ended: {why}")
    return held


def ahead(state: State, id_: str, now: float, rules: Rules) -> tuple[Waiting, ...]:
    """Who is before the request in line."""
    line = [waiting for _, waiting, devices, _ in _line(state, now, rules) if not devices]
    ids = [waiting.request.id for waiting in line]
    return tuple(line[: ids.index(id_)]) if id_ in ids else ()


def why_not(state: State, id_: str, now: float, rules: Rules) -> tuple[str, ...]:
    """Why a request waits: a line for each device that it might have."""
    waiting = state.waiting.get(id_)
    if waiting is None:
        return ()
    kept: Mapping[str, Waiting] = {}
    for _, each, _, kept_before in _line(state, now, rules):
        if each.request.id == id_:
            kept = dict(kept_before)
            break
    lines = []
    for device in waiting.request.devices:
        held, bad, other = state.held.get(device), state.quarantined.get(device), kept.get(device)
        if state.drained:
            lines.append(f"{device} is at a lab host that is drained {state.drained}")
        elif bad is not None and not waiting.request.repair:
            left = "until it is lifted" if bad.until is None else f"for {bad.until - now:.0f} s more"
            lines.append(f"{device} is quarantined by {bad.by} {left}: {bad.evidence}")
        elif held is not None:
            lines.append(f"{device} {describe(held, now)}")
        elif other is not None:
            lines.append(f"{device} is kept for {other.request.holder!r}, who is before you in line")
        else:
            lines.append(f"{device} is free, but {waiting.request.count} are wanted at once")
    return tuple(lines)


def describe(held: Held, now: float) -> str:
    """Who has a device, and for how long."""
    if held.ended:
        return f"still finishes work of an ended lease of {held.request.holder!r} ({held.ended})"
    return (
        f"is leased to {held.request.holder!r} since {now - held.since:.0f} s, for {held.until - now:.0f} s "
        f"more at most, last heartbeat {now - held.beat:.0f} s ago"
    )


def usage(state: State, user: str, now: float, rules: Rules) -> float:
    """Device-seconds the user had lately, with those of leases that go on."""
    return _past(state, user, now, rules) + sum(now - held.since for held in _used_by(state, user))


# -- facts --------------------------------------------------------------------------------------------


def fold(state: State, now: float, facts: Facts, rules: Rules) -> State:
    """The state after ``facts``."""
    for fact in facts:
        state = replace(_apply(state, now, fact, rules), at=now)
    return state


def _apply(state: State, now: float, fact: Fact, rules: Rules) -> State:
    match fact:
        case Snapshot(snapshot):
            return snapshot
        case Booted():
            return _booted(state, now, fact)
        case Started():
            held = {
                device: replace(each, beat=now) if each.request.agent == fact.agent else each
                for device, each in state.held.items()
            }
            return replace(state, held=held, agents={**state.agents, fact.agent: fact.process})
        case Asked(request):
            return replace(state, waiting={**state.waiting, request.id: Waiting(request, now, now)})
        case Withdrawn(id_):
            return replace(state, waiting=_without(state.waiting, id_))
        case Granted(id_, token, devices):
            request = state.waiting[id_].request
            new = {device: Held(device, token, request, now, now) for device in devices}
            return replace(
                state, token=token, waiting=_without(state.waiting, id_), held={**state.held, **new}
            )
        case Beat(id_, beat_s):
            return _beaten(state, now, id_, beat_s)
        case Ended(device, _, why):
            before = state.held[device]
            user = before.request.user
            used = _past(state, user, now, rules) + now - before.since
            return replace(
                state,
                held={**state.held, device: replace(before, ended=why)},
                used={**state.used, user: (used, now)},
            )
        case Freed(device):
            return replace(state, held=_without(state.held, device))
        case Quarantined(device, evidence, by, seconds):
            entry = Quarantine(evidence, by, None if seconds is None else now + seconds)
            return replace(state, quarantined={**state.quarantined, device: entry})
        case Lifted(device):
            return replace(state, quarantined=_without(state.quarantined, device))
        case Restarted(device, how):
            past = (*_today(state, device, now), Restart(how, now))
            return replace(state, restarts={**state.restarts, device: past})
        case Drained():
            return replace(state, drained=_drained(fact))


def _booted(state: State, now: float, fact: Booted) -> State:
    """The clock begins anew; quarantines go on for as long as they had left."""
    quarantined = {
        device: replace(each, until=None if each.until is None else now + max(0.0, each.until - state.at))
        for device, each in state.quarantined.items()
    }
    used = {user: (seconds, now) for user, (seconds, _) in state.used.items()}
    # How long the machine was off is not known: as if they had happened just now.
    restarts = {
        device: tuple(replace(each, at=now) for each in past) for device, past in state.restarts.items()
    }
    token = max(state.token, fact.token)
    return State(
        now,
        token,
        fact.boot,
        quarantined=quarantined,
        used=used,
        restarts=restarts,
        drained=state.drained,
    )


def _beaten(state: State, now: float, id_: str, beat_s: float | None) -> State:
    if id_ in state.waiting:
        waiting = {**state.waiting, id_: replace(state.waiting[id_], beat=now)}
        return replace(state, waiting=waiting)
    held = dict(state.held)
    for each in state.of(id_):
        request = each.request if beat_s is None else replace(each.request, beat_s=beat_s)
        held[each.device] = replace(each, beat=now, request=request)
    return replace(state, held=held)


# -- inside -------------------------------------------------------------------------------------------


def _line(
    state: State, now: float, rules: Rules
) -> Iterator[tuple[State, Waiting, tuple[str, ...], Mapping[str, Waiting]]]:
    """Everyone who waits, in line: the state then, who, the devices granted, those kept for who is before."""
    kept: dict[str, Waiting] = {}
    passed: set[str] = set()
    while len(passed) < len(state.waiting):
        waiting = min(
            (each for each in state.waiting.values() if each.request.id not in passed),
            key=lambda each: _rank(state, each, now, rules),
        )
        request = waiting.request
        sound = [d for d in request.devices if request.repair or d not in state.quarantined]
        sound = [] if state.drained else sound
        free = [device for device in sound if device not in state.held and device not in kept]
        if len(free) >= request.count:
            devices = tuple(free[: request.count])
            yield state, waiting, devices, kept
            state = fold(state, now, (Granted(request.id, state.token + 1, devices),), rules)
            continue
        yield state, waiting, (), kept
        passed.add(request.id)
        if len(sound) >= request.count:  # else it waits for a quarantine, which may last
            kept |= dict.fromkeys(free, waiting)


def _rank(state: State, waiting: Waiting, now: float, rules: Rules) -> tuple[float, float, int, float, str]:
    request = waiting.request
    step = request.priority + (now - waiting.since) // rules.ageing_s
    now_has = sum(1 for _ in _used_by(state, request.user))
    return -step, usage(state, request.user, now, rules), now_has, waiting.since, request.id


def _past(state: State, user: str, now: float, rules: Rules) -> float:
    seconds, at = state.used.get(user, (0.0, now))
    return float(seconds * 0.5 ** ((now - at) / rules.half_life_s))


def _today(state: State, device: str, now: float) -> tuple[Restart, ...]:
    return tuple(each for each in state.restarts.get(device, ()) if now - each.at < _DAY_S)


def _used_by(state: State, user: str) -> Iterator[Held]:
    return (held for held in state.held.values() if held.request.user == user and not held.ended)


def _drained(fact: Drained) -> str:
    return f"by {fact.by}: {fact.why}" if fact.why else ""


def _over(held: Held, now: float) -> str:
    """Why time ends the lease now; "" if it does not."""
    if held.ended:
        return ""
    if now >= held.beat + held.request.beat_s:
        return f"no heartbeat for {held.request.beat_s:g} s"
    return f"its {held.request.limit_s:g} s are over" if now >= held.until else ""


def _check(request: Request, rules: Rules) -> None:
    _check_beat(request.beat_s, rules)
    if not 0 < request.limit_s <= rules.limit_s:
        raise LeaseError(f"sought a time limit in (0, {rules.limit_s:g}] s, found {request.limit_s:g}")
    if len(set(request.devices)) != len(request.devices):
        raise LeaseError(f"sought each device once, found {', '.join(request.devices)}")
    if not 1 <= request.count <= len(request.devices):
        raise LeaseError(
            f"sought {request.count} of {len(request.devices)} devices ({', '.join(request.devices)}); "
            "there will never be so many"
        )


def _check_beat(beat_s: float, rules: Rules) -> None:
    if not 0 < beat_s <= rules.beat_s:
        raise LeaseError(f"sought a heartbeat's time limit in (0, {rules.beat_s:g}] s, found {beat_s:g}")


def _without(mapping: Mapping[str, V], key: str) -> dict[str, V]:
    return {k: v for k, v in mapping.items() if k != key}
