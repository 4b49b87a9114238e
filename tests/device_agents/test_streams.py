"""ProcessStream and LocalTransport: deadlines hold, and nothing outlives its close."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError, RunnerDied
from device_agents.local import LocalTransport, copy_file
from device_agents.streams import ProcessStream
from tests.device_agents.conftest import GRACE_S, group_is_gone


def shell(script: str) -> ProcessStream:
    return ProcessStream(["sh", "-c", script], grace_s=GRACE_S)


def test_what_is_written_can_be_read_back() -> None:
    stream = shell("exec cat")
    data = bytes(range(256)) * 1000  # more than a pipe holds
    half = len(data) // 2
    stream.write(data[:50_000], Deadline(10))
    assert stream.read_exactly(50_000, Deadline(10)) == data[:50_000]
    stream.write(data[:half][:60_000], Deadline(10))
    assert stream.read_exactly(60_000, Deadline(10)) == data[:half][:60_000]
    stream.close()


def test_a_process_that_reads_nothing_ends_a_write_at_its_deadline() -> None:
    stream = shell("exec sleep 300")
    with pytest.raises(DeadlineExceeded, match=r"writing to process \d+ \(sh\): not done within 0.2 s"):
        stream.write(bytes(1 << 20), Deadline(0.2))
    stream.close()
    assert group_is_gone(stream.pid)


def test_a_process_that_writes_nothing_ends_a_read_at_its_deadline() -> None:
    stream = shell("exec sleep 300")
    with pytest.raises(DeadlineExceeded, match="reading from"):
        stream.read_exactly(1, Deadline(0.2))
    stream.close()


def test_what_was_written_before_death_is_still_read() -> None:
    stream = shell("printf abc; exit 5")
    assert stream.read_exactly(3, Deadline(10)) == b"abc"
    with pytest.raises(RunnerDied, match="after 0 of 1 bytes sought: exit code 5"):
        stream.read_exactly(1, Deadline(10))
    stream.close()


def test_a_write_to_the_dead_says_how_it_died() -> None:
    stream = shell("exit 6")
    with pytest.raises(RunnerDied, match="exit code 6"):
        stream.write(bytes(1 << 20), Deadline(10))
    stream.close()


def test_a_write_to_the_dead_whose_child_holds_the_pipe_does_not_wait() -> None:
    stream = shell("exec 3<&0; sleep 300 <&3 & exit 6")
    within = Deadline(30)
    with pytest.raises(RunnerDied, match="exit code 6"):
        stream.write(bytes(1 << 20), Deadline(60))
    assert not within.expired
    stream.close()
    assert group_is_gone(stream.pid)


def test_close_lets_a_process_that_minds_its_input_end_by_itself(tmp_path: Path) -> None:
    stream = shell(f"cat > /dev/null; echo done > {tmp_path}/done")
    stream.close()
    assert (tmp_path / "done").read_text() == "done\n"


def test_close_asks_with_sigterm_before_it_kills(tmp_path: Path) -> None:
    stream = shell(f"trap 'echo asked > {tmp_path}/asked; exit' TERM; echo; while :; do sleep 0.05; done")
    stream.read_exactly(1, Deadline(10))
    stream.close()
    assert (tmp_path / "asked").exists()


def test_close_kills_what_is_deaf_with_all_its_children() -> None:
    stream = shell("trap '' TERM; sleep 300 & sleep 300 & echo; while :; do sleep 300; done")
    stream.read_exactly(1, Deadline(10))
    stream.close()
    assert group_is_gone(stream.pid)


def test_close_frees_a_process_that_blocks_on_its_own_output(tmp_path: Path) -> None:
    stream = shell(f"head -c 3000000 /dev/zero; cat > /dev/null; echo done > {tmp_path}/done")
    stream.close()
    assert (tmp_path / "done").exists()


def test_after_close_every_call_says_so_and_the_tail_is_kept() -> None:
    stream = shell("echo a last word >&2")
    stream.close()
    assert stream.stderr_tail() == "a last word"
    for call in (lambda: stream.read_exactly(1, Deadline(1)), lambda: stream.write(b"x", Deadline(1))):
        with pytest.raises(RunnerDied, match="closed from our side"):
            call()
    stream.close()


def test_only_the_last_lines_of_stderr_are_kept() -> None:
    stream = shell("i=0; while [ $i -lt 3000 ]; do echo line $i >&2; i=$((i+1)); done; echo")
    stream.read_exactly(1, Deadline(20))
    stream.close()
    assert stream.stderr_tail().splitlines() == [f"line {i}" for i in range(2980, 3000)]


def test_run_gives_both_outputs_and_the_code(transport: LocalTransport) -> None:
    result = transport.run(["sh", "-c", "echo out; echo err >&2; exit 3"], Deadline(10))
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"err\n")


def test_run_kills_what_is_late(transport: LocalTransport, tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match=r"killed after 0\.3 s"):
        transport.run(["sh", "-c", f"echo $$ > {tmp_path}/pid; sleep 300 & sleep 300"], Deadline(0.3))
    assert group_is_gone(int((tmp_path / "pid").read_text()))


def test_run_of_no_program_is_an_infrastructure_error(transport: LocalTransport) -> None:
    with pytest.raises(InfrastructureError, match="cannot start"):
        transport.run(["no-such-program"], Deadline(1))


def test_push_and_pull_copy_whole_files(transport: LocalTransport, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(1000))
    source.chmod(0o750)
    transport.push(source, str(tmp_path / "new folder" / "target"), Deadline(10))
    transport.pull(str(tmp_path / "new folder" / "target"), tmp_path / "back", Deadline(10))
    assert (tmp_path / "back").read_bytes() == bytes(1000)
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o750


def test_a_late_copy_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    with pytest.raises(DeadlineExceeded, match="copying source"):
        copy_file(source, tmp_path / "target", Deadline(0))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_copy_of_nothing_is_an_infrastructure_error(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="No such file"):
        copy_file(tmp_path / "absent", tmp_path / "target", Deadline(1))
