"""Shell v2 over adb: whole outputs or an error, deadlines hold, nothing outlives its close."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from device_agents.adb import sync
from device_agents.adb.connection import AdbServer, AdbSocket
from device_agents.adb.shell_v2 import STDIN, STDOUT, ShellChannel, ShellStream, packet
from device_agents.adb.transport import AdbTransport
from device_agents.api import ByteStream, Transport
from device_agents.deadline import Deadline
from device_agents.errors import (
    AdbFailure,
    DeadlineExceeded,
    DeployFailed,
    DeviceUnreachable,
    NoSpace,
    ProtocolError,
    RunnerDied,
    Unauthorized,
    UnsupportedDevice,
)
from tests.device_agents.adb_fixtures import adb, commands, phone
from tests.device_agents.conftest import group_is_gone, wait_for
from tests.device_agents.fake_adb import ADDRESS, SERIAL, FakeAdb

__all__ = ["adb", "commands", "phone"]  # fixtures


@contextmanager
def started(phone: AdbTransport, script: str) -> Iterator[ShellStream]:
    stream = phone.open_stream(["sh", "-c", script], {})
    try:
        yield stream
    finally:
        stream.close()


def test_it_is_a_transport_and_a_byte_stream(phone: AdbTransport) -> None:
    transport: Transport = phone
    stream: ByteStream = transport.open_stream(["true"], {})
    stream.close()


# -- finished commands ---------------------------------------------------------------------


def test_run_gives_both_outputs_and_the_code(phone: AdbTransport) -> None:
    result = phone.run(["sh", "-c", "echo out; echo err >&2; exit 3"], Deadline(10))
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"err\n")


def test_arguments_arrive_as_they_are(phone: AdbTransport) -> None:
    awkward = ["a b", "$HOME", "it's", 'quo"te', "new\nline", ";", ""]
    result = phone.run(["printf", "<%s>", *awkward], Deadline(10))
    assert result.stdout.decode() == "".join(f"<{word}>" for word in awkward)


def test_what_arrives_is_acknowledged_at_once() -> None:
    """Else a peer with Nagle's algorithm, as the adb server is, keeps each small answer back for 40 ms."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as ours,
        server.accept()[0] as theirs,
    ):
        channel = ShellChannel(AdbSocket(ours, "a peer of this test"))
        for answers in range(1, 21):
            # Question and answer in turn: what makes Linux wait with its acknowledgements.
            channel.step(memoryview(packet(STDIN, b"?")), 10)
            theirs.recv(100)
            theirs.sendall(packet(STDOUT, b"!"))
            wait_for(lambda: channel.step(None, 0.1) == 0 and bytes(channel.stdout) == b"!" * answers)  # noqa: B023
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) == 1, f"after {answers} answers"


def test_what_is_sent_goes_at_once(adb: FakeAdb) -> None:
    """Else our own small packets wait for the peer's acknowledgement."""
    with AdbServer(adb.port, start=False).open("a look", Deadline(10)) as connection:
        assert connection.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_much_goes_in_and_out(phone: AdbTransport) -> None:
    pieces = [bytes([i]) * 60_000 for i in range(100)]
    assert phone.shell("cat", Deadline(20), pieces).stdout == b"".join(pieces)


def test_a_process_that_ignores_its_input_does_not_block_us(phone: AdbTransport) -> None:
    assert phone.shell("exit 4", Deadline(20), [bytes(1 << 20)] * 8).returncode == 4


def test_a_checked_command_that_fails_says_why(phone: AdbTransport) -> None:
    with pytest.raises(AdbFailure, match=r"(?s)FAKE0001: [^\n]*exit code 9\n.*it said: no such luck"):
        phone.checked("echo no such luck >&2; exit 9", Deadline(10))


@pytest.mark.parametrize("at", [0, 4, 6, 2000])
def test_half_an_output_is_never_a_success(adb: FakeAdb, phone: AdbTransport, at: int) -> None:
    phone.shell("true", Deadline(10))
    prelude = len(b"OKAY" + bytes(8) + b"OKAY")
    adb.cut_after = prelude + at
    with pytest.raises(DeviceUnreachable, match="broke off before the process had ended"):
        phone.shell("head -c 5000 /dev/zero; sleep 300", Deadline(20))


def test_a_process_killed_by_a_signal_has_the_code_of_one(phone: AdbTransport) -> None:
    assert phone.shell("kill -9 $$", Deadline(10)).returncode == 128 + 9


def test_a_late_command_is_ended(phone: AdbTransport, tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match=r"not done within 0\.5 s"):
        phone.shell(f"echo $$ > {tmp_path}/pid; exec sleep 300", Deadline(0.5))
    assert group_is_gone(int((tmp_path / "pid").read_text()))


def test_a_frozen_link_ends_at_the_deadline(adb: FakeAdb, phone: AdbTransport) -> None:
    adb.frozen.set()
    with pytest.raises(DeadlineExceeded):
        phone.shell("true", Deadline(0.5))
    adb.frozen.clear()
    assert phone.shell("true", Deadline(10)).returncode == 0


def test_endless_output_is_refused(phone: AdbTransport) -> None:
    with pytest.raises(ProtocolError, match="more than 16,777,216 bytes"):
        phone.shell("cat /dev/zero", Deadline(60))


# -- reaching a device ---------------------------------------------------------------------


def test_no_server_is_an_adb_failure(phone: AdbTransport) -> None:
    lost = AdbTransport(AdbServer(1, start=False), SERIAL)
    with pytest.raises(AdbFailure, match="no adb server at port 1"):
        lost.shell("true", Deadline(5))


@pytest.mark.parametrize("state", ["offline", "absent"])
def test_a_device_that_comes_back_is_waited_for(adb: FakeAdb, phone: AdbTransport, state: str) -> None:
    adb.state = state
    timer = threading.Timer(0.5, lambda: setattr(adb, "state", "device"))
    timer.start()
    assert phone.shell("echo back", Deadline(10)).stdout == b"back\n"
    timer.join()


def test_a_device_that_stays_away_is_unreachable(adb: FakeAdb) -> None:
    adb.state = "offline"
    phone = AdbTransport(AdbServer(adb.port, start=False), SERIAL, reach_s=0.4)
    with pytest.raises(DeviceUnreachable, match=r"device offline.*tried for 0\.4 s"):
        phone.shell("true", Deadline(30))


def test_a_network_device_is_connected_again_and_the_answer_is_not_believed(adb: FakeAdb) -> None:
    adb.state = "absent"
    adb.connect_answer = f"already connected to {ADDRESS}"
    phone = AdbTransport(AdbServer(adb.port, start=False), ADDRESS, reach_s=0.4)
    with pytest.raises(DeviceUnreachable, match="not found"):
        phone.shell("true", Deadline(30))
    adb.on_connect = lambda: setattr(adb, "state", "device")
    adb.connect_answer = f"failed to connect to {ADDRESS}"
    assert phone.shell("true", Deadline(30)).returncode == 0


def test_a_device_that_does_not_trust_us_is_not_waited_for(adb: FakeAdb, phone: AdbTransport) -> None:
    adb.state = "unauthorized. This adb server's $ADB_VENDOR_KEYS is not set"
    with pytest.raises(Unauthorized, match="accept this computer's key"):
        phone.shell("true", Deadline(30))
    assert len(adb.requests) == 1


def test_a_device_without_shell_v2_is_refused_before_anything_runs(adb: FakeAdb, phone: AdbTransport) -> None:
    adb.features = "cmd,stat_v2"
    with pytest.raises(UnsupportedDevice, match=r"sought shell_v2.*found cmd, stat_v2"):
        phone.shell("true", Deadline(10))
    assert adb.services == []


# -- streams -------------------------------------------------------------------------------


def test_what_is_written_can_be_read_back(phone: AdbTransport) -> None:
    data = bytes(range(256)) * 1000
    with started(phone, "exec cat") as stream:
        stream.write(data, Deadline(10))
        assert stream.read_exactly(len(data), Deadline(10)) == data


def test_the_environment_and_awkward_words_arrive(phone: AdbTransport) -> None:
    stream = phone.open_stream(["sh", "-c", 'printf "%s|%s" "$KV" "$1"', "sh", "a 'b'"], {"KV": "x y"})
    assert stream.read_exactly(9, Deadline(10)) == b"x y|a 'b'"
    stream.close()


def test_a_process_that_writes_nothing_ends_a_read_at_its_deadline(phone: AdbTransport) -> None:
    late = pytest.raises(DeadlineExceeded, match=r"reading from FAKE0001: sh: not done within 0\.2 s")
    with started(phone, "exec sleep 300") as stream, late:
        stream.read_exactly(1, Deadline(0.2))
    assert group_is_gone(stream.pid)


def test_a_process_that_reads_nothing_ends_a_write_at_its_deadline(phone: AdbTransport) -> None:
    with started(phone, "exec sleep 300") as stream, pytest.raises(DeadlineExceeded, match="writing to"):
        stream.write(bytes(64 << 20), Deadline(0.5))
    assert group_is_gone(stream.pid)


def test_what_was_written_before_death_is_still_read(phone: AdbTransport) -> None:
    with started(phone, "printf abc; exit 5") as stream:
        assert stream.read_exactly(3, Deadline(10)) == b"abc"
        with pytest.raises(RunnerDied, match="after 0 of 1 bytes sought: exit code 5"):
            stream.read_exactly(1, Deadline(10))


def test_a_signal_is_named(phone: AdbTransport) -> None:
    with started(phone, "kill -9 $$") as stream, pytest.raises(RunnerDied, match=r"137 \(signal 9\)"):
        stream.read_exactly(1, Deadline(10))


def test_a_write_to_the_dead_says_how_it_died(phone: AdbTransport) -> None:
    with started(phone, "exit 6") as stream, pytest.raises(RunnerDied, match="exit code 6"):
        stream.write(bytes(256 << 20), Deadline(20))


def test_a_broken_link_is_not_a_dead_runner(adb: FakeAdb, phone: AdbTransport) -> None:
    with started(phone, "exec sleep 300") as stream:
        adb.hang_up()
        with pytest.raises(DeviceUnreachable, match="broke off"):
            stream.read_exactly(1, Deadline(10))
    assert group_is_gone(stream.pid)


def test_after_a_broken_link_close_ends_what_is_deaf(adb: FakeAdb, phone: AdbTransport) -> None:
    with started(phone, "trap '' HUP TERM; echo; while :; do sleep 1; done") as stream:
        stream.read_exactly(1, Deadline(10))
        adb.hang_up()
    assert group_is_gone(stream.pid)


def test_close_while_the_device_is_away_does_not_raise(adb: FakeAdb) -> None:
    phone = AdbTransport(AdbServer(adb.port, start=False), SERIAL, reach_s=0.3)
    with started(phone, "exec sleep 300") as stream:
        adb.state = "absent"
        adb.hang_up()
    assert group_is_gone(stream.pid)  # by the SIGHUP of adbd


def test_close_lets_a_process_that_minds_its_input_end_by_itself(phone: AdbTransport, tmp_path: Path) -> None:
    with started(phone, f"cat > /dev/null; echo done > {tmp_path}/done"):
        pass
    assert (tmp_path / "done").read_text() == "done\n"


def test_close_asks_with_sigterm_before_it_kills(phone: AdbTransport, tmp_path: Path) -> None:
    script = f"trap 'echo asked > {tmp_path}/asked; exit' TERM; echo; while :; do sleep 0.05; done"
    with started(phone, script) as stream:
        stream.read_exactly(1, Deadline(10))
    assert (tmp_path / "asked").exists()


def test_close_kills_what_is_deaf_with_all_its_children(phone: AdbTransport) -> None:
    script = "trap '' TERM HUP; sleep 300 & sleep 300 & echo; while :; do sleep 300; done"
    with started(phone, script) as stream:
        stream.read_exactly(1, Deadline(10))
    assert group_is_gone(stream.pid)


def test_close_ends_the_children_of_what_has_crashed(phone: AdbTransport) -> None:
    with started(phone, "sleep 300 > /dev/null 2>&1 & exit 3") as stream, pytest.raises(RunnerDied):
        stream.read_exactly(1, Deadline(10))
    assert group_is_gone(stream.pid)


def test_close_interrupts_a_read(phone: AdbTransport) -> None:
    stream = phone.open_stream(["sleep", "300"], {})
    errors: list[BaseException] = []

    def read() -> None:
        try:
            stream.read_exactly(1, Deadline(60))
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(stream._turn.locked)
    stream.close()
    reader.join(20)
    assert isinstance(errors[0], RunnerDied)
    assert "closed from our side" in str(errors[0])
    assert group_is_gone(stream.pid)


def test_after_close_every_call_says_so_and_the_tail_is_kept(phone: AdbTransport) -> None:
    with started(phone, "echo a last word >&2") as stream:
        pass
    assert stream.stderr_tail() == "a last word"
    with pytest.raises(RunnerDied, match="closed from our side"):
        stream.read_exactly(1, Deadline(1))
    with pytest.raises(RunnerDied, match="closed from our side"):
        stream.write(b"x", Deadline(1))
    stream.close()


def test_only_the_last_lines_of_stderr_are_kept(phone: AdbTransport) -> None:
    script = "i=0; while [ $i -lt 3000 ]; do echo line $i >&2; i=$((i+1)); done; echo"
    with started(phone, script) as stream:
        stream.read_exactly(1, Deadline(20))
    assert stream.stderr_tail().splitlines() == [f"line {i}" for i in range(2980, 3000)]
    assert len(stream._channel.stderr) <= 16 << 10


def test_no_program_is_a_dead_runner(phone: AdbTransport) -> None:
    stream = phone.open_stream(["no-such-program"], {})
    with pytest.raises(RunnerDied, match="exit code 127"):
        stream.read_exactly(1, Deadline(10))
    assert "no-such-program" in stream.stderr_tail()
    stream.close()


@pytest.mark.parametrize("garbage", [b"\x07\x00\x00\x00\x00", b"\x01\xff\xff\xff\xff", packet(3, b"12")])
def test_what_is_no_packet_is_a_protocol_error(
    phone: AdbTransport, monkeypatch: pytest.MonkeyPatch, garbage: bytes
) -> None:
    with started(phone, "read line; exit") as stream:
        stream._channel._raw += garbage
        stream.write(b"\n", Deadline(10))
        with pytest.raises(ProtocolError):
            stream.read_exactly(1, Deadline(10))
    assert packet(STDOUT, b"ab") == b"\x01\x02\x00\x00\x00ab"


# -- files ---------------------------------------------------------------------------------


def test_push_and_pull_bring_whole_files(phone: AdbTransport, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 1000)
    target = tmp_path / "on the phone" / "it's here"
    phone.push(source, str(target), Deadline(10), mode=0o750)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o750
    phone.pull(str(target), tmp_path / "back", Deadline(10))
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["it's here"]


def test_a_flipped_bit_in_a_push_leaves_the_target_as_it_was(
    adb: FakeAdb, phone: AdbTransport, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    adb.flip = 1
    with pytest.raises(DeployFailed, match="sought sha256"):
        phone.push(source, str(target), Deadline(10))
    assert target.read_bytes() == b"old"


def test_the_phones_words_about_a_push_come_back_typed(
    adb: FakeAdb, phone: AdbTransport, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    adb.sync_failure = "couldn't create file: No space left on device"
    with pytest.raises(NoSpace, match="No space left"):
        phone.push(tmp_path / "source", str(tmp_path / "target"), Deadline(10))
    adb.sync_failure = "couldn't create file: Permission denied"
    with pytest.raises(AdbFailure, match="Permission denied"):
        phone.push(tmp_path / "source", str(tmp_path / "target"), Deadline(10))


def test_a_pull_of_nothing_leaves_nothing(phone: AdbTransport, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(AdbFailure, match="No such file"):
        phone.pull("/no/such/file", tmp_path / "here" / "target", Deadline(10))
    assert list((tmp_path / "here").iterdir()) == []


def test_a_push_that_is_cut_is_an_adb_failure(adb: FakeAdb, phone: AdbTransport, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(1 << 20))
    phone.shell("true", Deadline(10))
    adb.cut_after = len(b"OKAY" + bytes(8) + b"OKAY")
    with pytest.raises(AdbFailure):
        phone.push(tmp_path / "source", str(tmp_path / "target"), Deadline(10))
    assert not (tmp_path / "target").exists()


def test_a_pull_without_end_is_refused_and_leaves_nothing(
    phone: AdbTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "MAX_PULL", 1000)
    (tmp_path / "endless").write_bytes(b"x" * 1001)
    with pytest.raises(AdbFailure, match="at most 1,000 bytes"):
        phone.pull(str(tmp_path / "endless"), tmp_path / "pulled", Deadline(10))
    assert not (tmp_path / "pulled").exists()
