"""A small world around the lease protocol, to be explored whole: clients, one agent, messages, crashes, time.

Everything that can happen next is an action; ``actions`` gives each with the world after it. What a client
sends may arrive late, in any order and twice. Clients die, the agent crashes and comes back with what the
journal says. What an agent's runners do is ``using``: the token each device works for.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from device_agents.errors import LeaseError
from device_agents.leases import protocol
from device_agents.leases.model import Process, Request, Rules, State

RULES = Rules(ageing_s=2.0, half_life_s=1e12)
BEAT_S, LIMIT_S = 1.0, 3.0
AGENT, AGENT_PROCESS = "agent", Process("host", 1, 1)
DEVICES = ("a", "b")
WANTED = (2, 1)  # devices of each client


class Client(NamedTuple):
    phase: str = "idle"  # idle, asked, has, dead
    asks: int = 0
    tokens: tuple[int, ...] = ()  # all that it ever had; it may come back with any
    died_at: int = -1


class World(NamedTuple):
    state: State = State()
    now: int = 0
    clients: tuple[Client, ...] = (Client(), Client())
    asking: tuple[tuple[int, str], ...] = ()  # requests on their way to the agent
    using: tuple[tuple[str, int], ...] = ()
    largest: tuple[tuple[str, int], ...] = ()  # token granted, by device
    budget: tuple[int, int, int] = (1, 1, 1)  # deaths, agent crashes, duplicated messages still to come

    def key(self) -> tuple[Any, ...]:
        """The same for worlds with the same future."""
        state = self.state
        waiting = tuple((w.request.id, w.since, w.beat) for w in state.waiting.values())
        held = tuple(
            sorted(
                (h.device, h.token, h.request.id, h.since, h.beat, bool(h.ended)) for h in state.held.values()
            )
        )
        return (state.token, waiting, held, tuple(sorted(state.used.items())), *self[1:])


def mutated(old: str, new: str) -> Any:
    """The protocol with ``old`` replaced in its source."""
    source = Path(protocol.__file__).read_text()
    assert source.count(old) == 1, f"{source.count(old)} times in the source: {old}"
    module = types.ModuleType("mutated_protocol")
    sys.modules[module.__name__] = module
    exec(compile(source.replace(old, new), protocol.__file__, "exec"), module.__dict__)
    return module


class Explorer:
    """rules: the protocol, maybe mutated. last: the time up to which the world is looked at."""

    def __init__(
        self, rules: Any = protocol, last: int = 2, asks: int = 1, budget: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        self.p = rules
        self.last = last
        self.asks = asks
        self.budget = budget

    def explore(self) -> tuple[int, str]:
        """How many worlds there are, and the first wrong thing found; "" if there is none."""
        first = self._act(World(budget=self.budget), self.p.start(AGENT, AGENT_PROCESS))
        seen, line = {first.key()}, [first]
        while line:
            following = []
            for world in line:
                for name, after in self.actions(world):
                    if wrong := self._wrong(world, name, after):
                        return len(seen), f"{name}: {wrong}\n{world}\n{after}"
                    if (key := after.key()) not in seen:
                        seen.add(key)
                        following.append(after)
            line = following
        return len(seen), ""

    # -- what can happen --------------------------------------------------------------------

    def actions(self, world: World) -> Iterator[tuple[str, World]]:
        for number in range(len(world.clients)):
            yield from self._of_client(world, number)
            yield from self._late(world, number)
        deaths, crashes, doubles = world.budget
        for number, id_ in world.asking:
            rest = world._replace(asking=tuple(each for each in world.asking if each != (number, id_)))
            yield f"ask {id_} arrives", self._asked(rest, number, id_)
            if doubles:
                twice = world._replace(budget=(deaths, crashes, doubles - 1))
                yield f"ask {id_} arrives, and will again", self._asked(twice, number, id_)
        if world.now < self.last:
            yield "time", self._reaped(world._replace(now=world.now + 1))
        if any(held.ended for held in world.state.held.values()):
            yield "clean", self._reaped(world)
        if crashes:
            down = world._replace(using=(), budget=(deaths, crashes - 1, doubles))
            yield "crash", self._act(down, self.p.start(AGENT, AGENT_PROCESS))

    def _of_client(self, world: World, number: int) -> Iterator[tuple[str, World]]:
        """What a living client does."""
        client = world.clients[number]
        if client.phase == "dead":
            return
        deaths, crashes, doubles = world.budget
        if deaths:
            dead = client._replace(phase="dead", died_at=world.now)
            yield f"{number} dies", _with(world, number, dead)._replace(budget=(deaths - 1, crashes, doubles))
        id_ = f"{number}.{client.asks}"
        if client.phase == "idle" and client.asks < self.asks:
            asked = client._replace(phase="asked", asks=client.asks + 1)
            sent = (*world.asking, (number, f"{number}.{asked.asks}"))
            yield f"{number} asks", _with(world, number, asked)._replace(asking=tuple(sorted(sent)))
        elif client.phase == "asked":
            if held := world.state.of(id_):
                has = client._replace(phase="has", tokens=(*client.tokens, held[0].token))
                yield f"{number} hears of its grant", _with(world, number, has)
            elif id_ not in world.state.waiting and (number, id_) not in world.asking:
                idle = client._replace(phase="idle")
                yield f"{number} hears that it waits no more", _with(world, number, idle)
        if client.phase in ("asked", "has"):
            yield f"{number} beats", self._act(world, self.p.beat(id_, RULES))
        if client.phase == "has":
            yield f"{number} goes on", _with(world, number, client._replace(phase="idle"))

    def _late(self, world: World, number: int) -> Iterator[tuple[str, World]]:
        """What may arrive of a client at any time, sent long ago, maybe twice, maybe by one now dead."""
        client = world.clients[number]
        for token in client.tokens:
            for device in DEVICES:
                if (after := self._worked(world, device, token)) is not world:
                    yield f"work with {token} on {device}", after
        for asks in range(1, client.asks + (client.phase in ("idle", "dead"))):
            ended = self._act(world, self.p.withdraw(f"{number}.{asks}", "released"))
            yield f"end of {number}.{asks}", self._reaped(ended)

    def _asked(self, world: World, number: int, id_: str) -> World:
        request = Request(
            id_, f"user {number}", f"client {number}", DEVICES, WANTED[number],
            limit_s=LIMIT_S, beat_s=BEAT_S, agent=AGENT,
        )  # fmt: skip
        return self._act(world, self.p.ask(request, RULES, wait=True))

    def _worked(self, world: World, device: str, token: int) -> World:
        try:
            self.p.current(world.state, device, token, world.now)
        except LeaseError:
            return world
        return world._replace(using=tuple(sorted({**dict(world.using), device: token}.items())))

    def _reaped(self, world: World) -> World:
        """The agent looks after its devices: what has ended is stopped, then free."""
        world = self._act(world, lambda state, now: ())
        using = dict(world.using)
        for held in list(world.state.held.values()):
            if held.ended:
                using.pop(held.device, None)
                world = self._act(world, self.p.freed(held.device, held.token))
        return world._replace(using=tuple(sorted(using.items())))

    def _act(self, world: World, command: Any) -> World:
        """As Ledger.act."""
        now, before = world.now, world.state
        state = self.p.fold(before, now, self.p.due(before, now), RULES)
        with suppress(LeaseError):
            state = self.p.fold(state, now, command(state, now), RULES)
        state = self.p.fold(state, now, self.p.grants(state, now, RULES), RULES)
        new = {d: h.token for d, h in state.held.items() if h.token > before.token}
        largest = tuple(sorted({**dict(world.largest), **new}.items())) if new else world.largest
        return world._replace(state=state, largest=largest)

    # -- what must hold ---------------------------------------------------------------------

    def _wrong(self, before: World, name: str, world: World) -> str:
        held, now = world.state.held, world.now
        for device, token in world.using:
            if world.using != before.using and token < dict(world.largest)[device]:
                return f"FENCED: {device} takes token {token}, and a later one was granted"
            if device not in held or held[device].token != token:
                return f"EXCLUSIVE: {device} works for token {token} and is not, or no more, its"
        for number, client in enumerate(world.clients):
            if name == "time" and client.phase == "dead" and now > client.died_at + BEAT_S:
                his = [each for each in held.values() if each.request.id.startswith(f"{number}.")]
                if any(each.since < now - BEAT_S for each in his):  # else its request came after its death
                    return f"FREED: client {number} died at {client.died_at} and has a device at {now}"
        free = [device for device in DEVICES if device not in held]
        for waiting in world.state.waiting.values():
            others = len(world.state.waiting) > 1
            if len(free) >= waiting.request.count and (not others or len(free) == len(DEVICES)):
                return f"GRANTED: {waiting.request.id} waits for what is free"
        return ""


def _with(world: World, number: int, client: Client) -> World:
    clients = list(world.clients)
    clients[number] = client
    return world._replace(clients=tuple(clients))
