"""The only way to a virtual phone: a listening socket on 127.0.0.1, and faults on the way.

A relay joins each connection made to its socket with one to the phone's adbd, which listens inside
the phone's own network namespace. Cables, hubs and networks fail between those two; here is where
that is done on purpose.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

from device_agents.virtual.loop import READ, WRITE, Loop

Direction = Literal["to_phone", "to_host"]

_PIECE = 1 << 18
_BUFFER = 1 << 20  # bytes under way in one direction; more stays with the sender


Trigger = Callable[[Callable[[], None]], None]
"""Does something while the relay waits, then calls what it was given, once."""


class Faults(Protocol):
    """What can go wrong between a lab host and a phone, on purpose."""

    def cut(self) -> int:
        """Reset all connections, as a pulled cable does; returns how many there were."""
        ...

    def freeze(self, seconds: float) -> None:
        """Carry nothing for so long, then everything that waited; connections stay open."""
        ...

    def refuse(self, refusing: bool) -> None:
        """Whether new connections are dropped at once; those there are go on."""
        ...

    def corrupt(self, direction: Direction, after_bytes: int) -> None:
        """Flip one bit of the byte that comes after the next ``after_bytes`` in this direction."""
        ...


class _Pipe:
    """Bytes from one socket to another."""

    def __init__(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        self.source, self.target, self.direction = source, target, direction
        self.buffer = bytearray()
        self.ripe = 0  # bytes of it that have been under way for long enough
        self.ended = False  # the source will send no more
        self.shut = False  # and the target knows


class _Pair:
    def __init__(self, host: socket.socket, phone: socket.socket, carry: Callable[[_Pair], None]) -> None:
        self.sockets = (host, phone)
        self.on_ready: Callable[[int], None] = lambda _: carry(self)
        self.pipes = (_Pipe(host, phone, "to_phone"), _Pipe(phone, host, "to_host"))


class Relay:
    """Carries bytes between connections to ``listener`` and to the phone, on ``loop``; implements Faults.

    dial: asks for a connection to the phone; whoever is asked answers each time, in order, by
    ``connected``. The listener is the caller's to close. latency_s: how long each byte is under way, in each
    direction; as over a network, more of them may be under way at once.
    """

    def __init__(
        self, loop: Loop, listener: socket.socket, dial: Callable[[], None], latency_s: float = 0.0
    ) -> None:
        self._loop, self._listener, self._dial = loop, listener, dial
        self._latency_s = latency_s
        self._waiting: deque[socket.socket | None] = deque()  # None: gone before the phone answered
        self._pairs: list[_Pair] = []
        self._frozen = 0  # freezes under way
        self._refusing = False
        self._corruptions: dict[Direction, int] = {}
        self._triggers: dict[Direction, tuple[int, Trigger]] = {}
        self.carried: dict[Direction, int] = {"to_phone": 0, "to_host": 0}  # bytes so far
        listener.setblocking(False)
        loop.watch(listener, READ, self._accept)

    @property
    def connections(self) -> int:
        return len(self._pairs)

    def connected(self, phone: socket.socket | None) -> None:
        """The answer to the oldest ``dial``; None if the phone does not listen."""
        host = self._waiting.popleft()
        if host is None or phone is None:
            for unpaired in (host, phone):
                if unpaired is not None:
                    _reset(unpaired)
            return
        pair = _Pair(host, phone, self._carry)
        for end in pair.sockets:
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs.append(pair)
        self._arm(pair)

    def cut(self) -> int:
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair.sockets:
                self._loop.forget(end)
                _reset(end)
        for index, waiting in enumerate(self._waiting):
            if waiting is not None:
                _reset(waiting)
                self._waiting[index] = None
        return len(pairs)

    def freeze(self, seconds: float) -> None:
        self._frozen += 1
        self._loop.later(seconds, self._thaw)
        self._arm_all()

    def refuse(self, refusing: bool) -> None:
        self._refusing = refusing

    def corrupt(self, direction: Direction, after_bytes: int) -> None:
        self._corruptions[direction] = self.carried[direction] + after_bytes

    def trigger(self, direction: Direction, after_bytes: int, action: Trigger) -> None:
        """Call ``action(go_on)`` once exactly ``after_bytes`` more have been taken in this direction.

        Nothing is carried from then on until ``go_on`` is called, so what ``action`` does comes in time.
        """
        self._triggers[direction] = (self.carried[direction] + after_bytes, action)

    def _pull(self, action: Trigger) -> None:
        self._arm_all()
        action(self._thaw)

    def _thaw(self) -> None:
        self._frozen -= 1
        self._arm_all()

    def _arm_all(self) -> None:
        self._loop.watch(self._listener, 0 if self._frozen else READ, self._accept)
        for pair in self._pairs:
            self._arm(pair)

    def _accept(self, _: int) -> None:
        try:
            host, _address = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if self._refusing:
            _reset(host)
            return
        self._waiting.append(host)
        self._dial()

    def _arm(self, pair: _Pair) -> None:
        """Watch for what the pair can do next."""
        for end in pair.sockets:
            events = 0
            for pipe in pair.pipes:
                if pipe.source is end and not pipe.ended and len(pipe.buffer) < _BUFFER:
                    events |= READ
                if pipe.target is end and pipe.ripe:
                    events |= WRITE
            self._loop.watch(end, 0 if self._frozen else events, pair.on_ready)

    def _carry(self, pair: _Pair) -> None:
        try:
            for pipe in pair.pipes:
                self._receive(pair, pipe)
                self._send(pipe)
        except OSError:
            self._drop(pair)
            return
        if all(pipe.shut for pipe in pair.pipes):
            self._drop(pair)
        else:
            self._arm(pair)

    def _receive(self, pair: _Pair, pipe: _Pipe) -> None:
        if pipe.ended or len(pipe.buffer) >= _BUFFER:
            return
        at, action = self._triggers.get(pipe.direction, (None, None))
        most = _PIECE if at is None else max(1, min(_PIECE, at - self.carried[pipe.direction]))
        try:
            piece = pipe.source.recv(most)
        except BlockingIOError:
            return
        if not piece:
            pipe.ended = True
            return
        pipe.buffer += self._corrupted(pipe.direction, piece)
        self.carried[pipe.direction] += len(piece)
        if self._latency_s:
            self._loop.later(self._latency_s, partial(self._ripen, pair, pipe, len(piece)))
        else:
            pipe.ripe += len(piece)
        if action is not None and at is not None and self.carried[pipe.direction] >= at:
            del self._triggers[pipe.direction]
            self._frozen += 1
            # Not now: it may take away the pair that is being served.
            self._loop.later(0.0, partial(self._pull, action))

    def _ripen(self, pair: _Pair, pipe: _Pipe, size: int) -> None:
        pipe.ripe += size
        if pair in self._pairs:
            self._arm(pair)

    def _send(self, pipe: _Pipe) -> None:
        if pipe.ripe:
            try:
                sent = pipe.target.send(pipe.buffer if self._latency_s == 0 else pipe.buffer[: pipe.ripe])
            except BlockingIOError:
                return
            del pipe.buffer[:sent]
            pipe.ripe -= sent
        if pipe.ended and not pipe.buffer and not pipe.shut:
            pipe.target.shutdown(socket.SHUT_WR)
            pipe.shut = True

    def _corrupted(self, direction: Direction, piece: bytes) -> bytes:
        at = self._corruptions.get(direction, -1) - self.carried[direction]
        if not 0 <= at < len(piece):
            return piece
        del self._corruptions[direction]
        return piece[:at] + bytes([piece[at] ^ 0x10]) + piece[at + 1 :]

    def _drop(self, pair: _Pair) -> None:
        """When one side is gone, so is the other."""
        self._pairs.remove(pair)
        for end in pair.sockets:
            self._loop.forget(end)
            end.close()


def _reset(end: socket.socket) -> None:
    """Close with a reset, so that the other side knows at once and nothing lingers in TIME_WAIT."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    end.close()
