"""The relay of a virtual phone: bytes go through whole, and each fault does what it says."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from device_agents.deadline import Deadline
from device_agents.virtual.loop import READ, Loop
from device_agents.virtual.relay import Relay

OpenClient = Callable[[], socket.socket]


class Lab:
    """A relay in front of a server of ours, all on one loop that the test turns."""

    def __init__(self, latency_s: float = 0.0) -> None:
        self.loop = Loop()
        self.phone_listens = True
        self.answers = True  # whether a dial is answered at once
        self.unanswered = 0
        self.server = _listener()
        self.listener = _listener()
        self.accepted: list[socket.socket] = []
        self.clients: list[socket.socket] = []
        self.relay = Relay(self.loop, self.listener, self._dial, latency_s)
        self.server.setblocking(False)
        self.loop.watch(self.server, READ, self._accept)

    def client(self) -> socket.socket:
        """Connected to the relay; the server's end is the newest of ``accepted`` once it got there."""
        made = socket.create_connection(self.listener.getsockname(), timeout=5)
        made.setblocking(False)
        self.clients.append(made)
        return made

    def pair(self) -> tuple[socket.socket, socket.socket]:
        before, paired = len(self.accepted), self.relay.connections
        client = self.client()
        self.turn(lambda: len(self.accepted) > before and self.relay.connections > paired)
        return client, self.accepted[-1]

    def turn(self, until: Callable[[], bool], within_s: float = 10.0) -> None:
        deadline = Deadline(within_s)
        while not until():
            assert not deadline.expired, f"not within {within_s} s"
            self.loop.once(0.01)

    def turn_for(self, seconds: float) -> None:
        deadline = Deadline(seconds)
        while not deadline.expired:
            self.loop.once(0.01)

    def carry(self, source: socket.socket, target: socket.socket, data: bytes) -> bytes:
        """Send ``data``; what arrived once as many bytes had."""
        rest, got = memoryview(data), bytearray()

        def moved() -> bool:
            nonlocal rest
            if rest:
                with contextlib.suppress(BlockingIOError):
                    rest = rest[source.send(rest[: 1 << 16]) :]
            got.extend(_read(target) or b"")
            return len(got) >= len(data)

        self.turn(moved)
        return bytes(got)

    def answer(self) -> None:
        self.unanswered -= 1
        self.relay.connected(
            socket.create_connection(self.server.getsockname(), timeout=5) if self.phone_listens else None
        )

    def close(self) -> None:
        self.relay.cut()
        for each in (*self.clients, *self.accepted, self.server, self.listener):
            if each.fileno() >= 0:
                self.loop.forget(each)
                each.close()
        self.loop.close()

    def _dial(self) -> None:
        self.unanswered += 1
        if self.answers:
            self.answer()

    def _accept(self, _: int) -> None:
        made, _address = self.server.accept()
        made.setblocking(False)
        self.accepted.append(made)


def _listener() -> socket.socket:
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    made.listen(8)
    return made


def _read(source: socket.socket) -> bytes | None:
    """What there is; None when there is nothing yet. Raises ConnectionResetError."""
    try:
        return source.recv(1 << 16)
    except BlockingIOError:
        return None


def _is_reset(source: socket.socket) -> bool:
    try:
        return source.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.close()


def test_megabytes_go_both_ways_unchanged(lab: Lab) -> None:
    host, phone = lab.pair()
    data = random.Random(1).randbytes(5_000_000)
    assert lab.carry(host, phone, data) == data
    assert lab.carry(phone, host, data[::-1]) == data[::-1]
    assert lab.relay.carried == {"to_phone": len(data), "to_host": len(data)}


def test_with_latency_everything_comes_whole_and_no_sooner() -> None:
    latency_s = 0.05
    lab = Lab(latency_s)
    try:
        host, phone = lab.pair()
        data = random.Random(2).randbytes(3_000_000)
        assert lab.carry(host, phone, data) == data
        for source, target in ((host, phone), (phone, host)):
            began = time.monotonic()
            assert lab.carry(source, target, b"ping") == b"ping"
            assert time.monotonic() - began >= latency_s
        host.send(b"the last")
        host.shutdown(socket.SHUT_WR)
        got = bytearray()

        def ended() -> bool:
            piece = _read(phone)
            got.extend(piece or b"")
            return piece == b""

        lab.turn(ended)
        assert got == b"the last"
    finally:
        lab.close()


def test_a_sender_waits_for_a_receiver_that_does_not_read(lab: Lab) -> None:
    host, _phone = lab.pair()
    sent, rounds_without = 0, 0
    while rounds_without < 50:
        try:
            sent += host.send(bytes(1 << 16))
            rounds_without = 0
        except BlockingIOError:
            rounds_without += 1
        lab.loop.once(0.01)
        assert sent < 64 << 20, "the relay takes everything"
    assert sent > 1 << 20


def test_the_end_of_one_direction_is_passed_on_and_the_other_lives(lab: Lab) -> None:
    host, phone = lab.pair()
    host.shutdown(socket.SHUT_WR)
    lab.turn(lambda: _read(phone) == b"")
    assert lab.carry(phone, host, b"still here") == b"still here"
    phone.close()
    lab.turn(lambda: _read(host) == b"")
    lab.turn(lambda: lab.relay.connections == 0)


def test_one_side_gone_ends_the_other(lab: Lab) -> None:
    host, phone = lab.pair()
    phone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    phone.close()
    lab.turn(lambda: _is_reset(host))
    assert lab.relay.connections == 0


def test_a_phone_that_does_not_listen_resets_the_client(lab: Lab) -> None:
    lab.phone_listens = False
    client = lab.client()
    lab.turn(lambda: _is_reset(client))


def test_cut_ends_every_connection_and_new_ones_work(lab: Lab) -> None:
    pairs = [lab.pair() for _ in range(3)]
    assert lab.relay.cut() == 3
    for host, phone in pairs:
        lab.turn(lambda host=host: _is_reset(host))  # type: ignore[misc]
        lab.turn(lambda phone=phone: _is_reset(phone))  # type: ignore[misc]
    host, phone = lab.pair()
    assert lab.carry(host, phone, b"again") == b"again"


def test_cut_ends_also_what_still_waits_for_the_phone(lab: Lab) -> None:
    lab.answers = False
    waiting = lab.client()
    lab.turn(lambda: lab.unanswered == 1)
    lab.relay.cut()
    lab.turn(lambda: _is_reset(waiting))
    lab.answer()  # too late for that one
    assert lab.relay.connections == 0
    lab.turn(lambda: len(lab.accepted) == 1 and _is_reset(lab.accepted[0]))
    lab.answers = True
    host, phone = lab.pair()
    assert lab.carry(host, phone, b"next") == b"next"


def test_freeze_carries_nothing_until_it_is_over_and_then_everything(lab: Lab) -> None:
    host, phone = lab.pair()
    lab.relay.freeze(0.4)
    frozen = Deadline(0.35)
    host.sendall(b"patience")
    while not frozen.expired:
        lab.loop.once(0.01)
        assert _read(phone) is None
    got = bytearray()
    lab.turn(lambda: got.extend(_read(phone) or b"") or len(got) == 8)  # type: ignore[func-returns-value]
    assert got == b"patience"


def test_a_second_freeze_prolongs_the_first(lab: Lab) -> None:
    host, phone = lab.pair()
    lab.relay.freeze(0.1)
    lab.relay.freeze(0.4)
    host.sendall(b"x")
    lab.turn_for(0.25)
    assert _read(phone) is None
    lab.turn(lambda: _read(phone) == b"x")


def test_while_frozen_a_new_connection_waits(lab: Lab) -> None:
    lab.relay.freeze(0.3)
    lab.client()
    lab.turn_for(0.15)
    assert lab.accepted == []
    lab.turn(lambda: lab.relay.connections == 1)


def test_refuse_drops_new_connections_and_keeps_the_old(lab: Lab) -> None:
    host, phone = lab.pair()
    lab.relay.refuse(True)
    dropped = lab.client()
    lab.turn(lambda: _is_reset(dropped))
    assert lab.carry(host, phone, b"old") == b"old"
    lab.relay.refuse(False)
    lab.pair()


@pytest.mark.parametrize("after", [0, 1, 70_000, 299_999])
def test_corrupt_changes_exactly_one_bit_of_the_byte_named(lab: Lab, after: int) -> None:
    host, phone = lab.pair()
    lab.carry(host, phone, b"before")
    lab.relay.corrupt("to_phone", after)
    data = random.Random(2).randbytes(300_000)
    assert lab.carry(phone, host, data) == data  # the other way
    got = lab.carry(host, phone, data)
    wrong = [index for index, (a, b) in enumerate(zip(data, got, strict=True)) if a != b]
    assert wrong == [after]
    assert (data[after] ^ got[after]).bit_count() == 1
    assert lab.carry(host, phone, data) == data  # once


@pytest.mark.parametrize("after", [1, 70_000, 299_999])
def test_a_trigger_fires_once_when_exactly_so_many_bytes_have_gone(lab: Lab, after: int) -> None:
    host, phone = lab.pair()
    lab.carry(host, phone, b"before")
    seen: list[int] = []

    def look(go_on: Callable[[], None]) -> None:
        seen.append(lab.relay.carried["to_host"])
        go_on()

    lab.relay.trigger("to_host", after, look)
    data = random.Random(3).randbytes(300_000)
    assert lab.carry(host, phone, data) == data
    assert seen == []  # that was the other way
    assert lab.carry(phone, host, data) == data
    assert seen == [after]
    assert lab.carry(phone, host, data) == data
    assert len(seen) == 1


def test_nothing_passes_a_trigger_before_it_has_done_its_work(lab: Lab) -> None:
    host, phone = lab.pair()
    pulled: list[Callable[[], None]] = []
    lab.relay.trigger("to_phone", 5, pulled.append)
    host.sendall(b"12345678")
    lab.turn(lambda: bool(pulled))
    lab.turn_for(0.1)
    assert (_read(phone) or b"") in (b"", b"12345")
    assert lab.relay.carried["to_phone"] == 5
    lab.relay.cut()
    pulled[0]()
    lab.turn(lambda: _is_reset(phone))
    host, phone = lab.pair()
    assert lab.carry(host, phone, b"again") == b"again"
