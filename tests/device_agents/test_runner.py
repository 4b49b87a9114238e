"""A runner in a process of its own: what it answers, and what becomes of every way it can fail."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from device_agents import runner
from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError, ProtocolError, RunnerDied
from device_agents.local import LocalTransport, local_environment
from device_agents.messages import Close, Closed, GetVitals, Hello, HelloReply, RunProgram
from device_agents.remote_session import RunnerClient
from device_agents.streams import ProcessStream
from kvengine.errors import ArtifactError, InvalidRequest
from kvengine.program import Decode, Observation, Prefill, Program, Workload
from kvengine.session import EngineSession
from tests.device_agents import fake_runner
from tests.device_agents.conftest import FAKE_RUNNER, OpenSession, group_is_gone, wait_for

GOOD = Program(8, (Prefill((1, 2, 3)), Decode((9,)), Prefill((4,))))


def program(trouble: int) -> Program:
    return Program(8, (Prefill((trouble,)), Prefill((1,))))


def wait_until_gone(pid: int, seconds: float) -> None:
    """For a process that need not be our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        assert ready, f"process {pid} still runs after {seconds} s"
    finally:
        os.close(descriptor)


# -- what it answers -------------------------------------------------------------------------


def test_a_runner_session_is_an_engine_session(open_session: OpenSession) -> None:
    session: EngineSession = open_session()
    assert session.info.session.threads == 2
    assert session.info.nodes_by_provider == {"CPUExecutionProvider": 3}


def test_a_program_comes_back_as_observations_with_their_logits(open_session: OpenSession) -> None:
    first, refused, last = open_session().run_program(GOOD)
    assert first.position == 3
    assert first.logits.dtype == np.float32
    np.testing.assert_array_equal(first.logits, np.repeat([[1.0], [2.0], [3.0]], fake_runner.VOCAB, axis=1))
    assert refused.error is not None
    assert refused.error.type == "InvalidToken"
    assert refused.logits.shape == (0, fake_runner.VOCAB)
    np.testing.assert_array_equal(last.logits, np.full((1, fake_runner.VOCAB), 4.0))


def test_a_workload_comes_back_with_its_raw_samples(open_session: OpenSession) -> None:
    measured = open_session().run_workload(Workload((1, 2), 3, repeats=2))
    assert [s.itl_ms for s in measured.samples] == [(0.5, 0.75)] * 2
    assert measured.kv_bytes == 2000


def test_vitals_are_read_on_the_device(open_session: OpenSession) -> None:
    vitals = open_session().vitals()
    assert vitals.mem_available_bytes is not None
    assert vitals.mem_available_bytes > 0


def test_hello_tells_who_the_device_is(transport: LocalTransport) -> None:
    client = RunnerClient(transport.open_stream(FAKE_RUNNER, {}))
    reply, _ = client.call(Hello(), HelloReply, Deadline(30))
    client.close(Deadline(5))
    assert "CPUExecutionProvider" in reply.probe.providers
    assert reply.probe.runtime["numpy"] == np.__version__
    assert reply.probe.cores == len(os.sched_getaffinity(0))
    assert reply.probe.ram_bytes > 1 << 20


def test_the_recipes_environment_is_the_runners_from_its_start(open_session: OpenSession) -> None:
    assert open_session(environment={"FAKE_NOTE": "seen"}).info.notes == ("seen",)


def test_an_engine_refusal_is_the_same_class_here_and_the_session_goes_on(open_session: OpenSession) -> None:
    session = open_session()
    with pytest.raises(InvalidRequest, match="a capacity of 0 makes no sense"):
        session.run_program(program(fake_runner.REFUSE))
    assert len(session.run_program(GOOD)) == 3


def test_a_refused_artifact_leaves_no_runner(open_session: OpenSession, streams: list[ProcessStream]) -> None:
    with pytest.raises(ArtifactError, match=r"sought artifact\.json"):
        open_session(folder=fake_runner.REFUSED_FOLDER)
    assert group_is_gone(streams[0].pid)


def test_work_before_open_is_refused_not_crashed(transport: LocalTransport) -> None:
    client = RunnerClient(transport.open_stream(FAKE_RUNNER, {}))
    with pytest.raises(InvalidRequest, match="no artifact is open"):
        client.call(RunProgram(GOOD), Closed, Deadline(30))
    client.close(Deadline(5))


def test_stray_prints_do_not_reach_the_frames(
    open_session: OpenSession, streams: list[ProcessStream]
) -> None:
    session = open_session()
    assert len(session.run_program(program(fake_runner.PRINT))) == 2
    assert len(session.run_program(GOOD)) == 3
    tail = streams[0].stderr_tail()
    for stray in ("stray print", "stray write of a C library", "stray echo of a child"):
        assert stray in tail


def test_a_flood_on_stderr_blocks_nobody(open_session: OpenSession, streams: list[ProcessStream]) -> None:
    assert len(open_session().run_program(program(fake_runner.FLOOD_STDERR))) == 2
    assert "warning 99999 of a chatty library" in streams[0].stderr_tail()


def test_closing_ends_the_engine_and_the_process(
    open_session: OpenSession, streams: list[ProcessStream]
) -> None:
    session = open_session()
    session.close()
    assert group_is_gone(streams[0].pid)
    assert "fake engine closed" in streams[0].stderr_tail()
    session.close()  # a second time does nothing
    with pytest.raises(RunnerDied, match="session is closed: closed from our side"):
        session.run_program(GOOD)


# -- how it fails ----------------------------------------------------------------------------

FAILURES = {
    "killed": (fake_runner.DIE, RunnerDied, "killed by SIGKILL"),
    "exits": (fake_runner.EXIT_7, RunnerDied, "exit code 7"),
    "crashes": (fake_runner.CRASH, RunnerDied, "ZeroDivisionError: a bug in the engine"),
    "hangs": (fake_runner.HANG, DeadlineExceeded, "not done within 1 s"),
    "garbage": (fake_runner.GARBAGE, ProtocolError, "Segmentation fault"),
    "half a frame, hangs": (fake_runner.HALF_FRAME_HANG, DeadlineExceeded, "not done within 1 s"),
    "half a frame, dies": (fake_runner.HALF_FRAME_DIE, RunnerDied, "after 6 of 32 bytes sought: exit code 3"),
    "huge lengths": (fake_runner.HUGE, ProtocolError, "this one is 1,099,511,627,776"),
    "closes stdout": (fake_runner.CLOSE_STDOUT, RunnerDied, "closed its pipes"),
    "dies, a child holds the pipe": (fake_runner.ORPHAN_CHILD, RunnerDied, "exit code 4"),
    "an old reply": (fake_runner.STALE_REPLY, ProtocolError, "sought the reply to 2, found one to 1"),
    "too few observations": (fake_runner.WRONG_COUNT, ProtocolError, "2 operations were answered by 1"),
    "an unknown engine error": (fake_runner.UNKNOWN_ERROR, ProtocolError, "unknown engine error 'UnheardOf'"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_each_failure_is_an_infrastructure_error_and_ends_the_runner(
    failure: str, open_session: OpenSession, streams: list[ProcessStream]
) -> None:
    trouble, expected, message = FAILURES[failure]
    session = open_session(program_s=1 if expected is DeadlineExceeded else 20)
    within = Deadline(18)
    with pytest.raises(InfrastructureError) as caught:
        session.run_program(program(trouble))
    assert not within.expired
    assert type(caught.value) is expected
    assert message in str(caught.value)
    assert "last words of the fake engine" in str(caught.value)
    assert group_is_gone(streams[0].pid)
    with pytest.raises(RunnerDied, match="session is closed: run_program failed"):
        session.run_program(GOOD)


def test_a_program_that_is_not_there_is_a_dead_runner(transport: LocalTransport) -> None:
    with pytest.raises(RunnerDied, match="no-such-program"):
        transport.open_stream(["no-such-program"], {})


def test_a_reply_of_the_wrong_type_is_a_protocol_error(transport: LocalTransport) -> None:
    client = RunnerClient(transport.open_stream(FAKE_RUNNER, {}))
    with pytest.raises(ProtocolError, match="sought Closed, found VitalsReply"):
        client.call(GetVitals(), Closed, Deadline(30))


def test_a_request_that_is_none_ends_the_runner(transport: LocalTransport) -> None:
    stream = transport.open_stream(FAKE_RUNNER, {})
    stream.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", Deadline(30))
    with pytest.raises(RunnerDied, match=f"exit code {runner.EXIT_PROTOCOL}"):
        stream.read_exactly(1, Deadline(30))
    stream.close()
    assert "GET / HTTP" in stream.stderr_tail()


def test_close_from_another_thread_interrupts_a_hanging_call(
    open_session: OpenSession, tmp_path: Path
) -> None:
    session = open_session(program_s=60, environment={"FAKE_STARTED": str(tmp_path / "started")})
    errors: list[BaseException] = []

    def call() -> None:
        try:
            session.run_program(program(fake_runner.HANG))
        except InfrastructureError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_for((tmp_path / "started").exists)
    within = Deadline(20)
    session.close()
    thread.join(10)
    assert not thread.is_alive()
    assert not within.expired
    assert [type(e) for e in errors] == [RunnerDied]


def test_two_calls_at_once_take_turns(open_session: OpenSession) -> None:
    session = open_session()
    answers: dict[int, tuple[Observation, ...]] = {}

    def call(token: int) -> None:
        answers[token] = session.run_program(Program(8, (Prefill((token,)),)))

    threads = [threading.Thread(target=call, args=(token,)) for token in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {token: float(a[0].logits[0, 0]) for token, a in answers.items()} == {t: t for t in range(8)}


# -- orphans ---------------------------------------------------------------------------------

PARENT = """
import sys
from device_agents.deadline import Deadline
from device_agents.remote_session import RunnerSession
from device_agents.streams import ProcessStream
from kvengine.program import Prefill, Program
from kvengine.recipe import SessionRecipe
stream = ProcessStream(sys.argv[2:])
session = RunnerSession.open(stream, "folder", SessionRecipe(), Deadline(30))
sys.stdout.write(f"{stream.pid}\\n")
sys.stdout.flush()
session.run_program(Program(8, (Prefill((int(sys.argv[1]),)),)))
sys.stdin.read()
"""


@pytest.mark.parametrize("doing", [fake_runner.HANG, 1], ids=["in the middle of work", "idle"])
def test_a_runner_ends_by_itself_when_its_parent_is_killed(doing: int, tmp_path: Path) -> None:
    argv = [sys.executable, "-P", "-c", PARENT, str(doing), *FAKE_RUNNER]
    environment = local_environment({"FAKE_STARTED": str(tmp_path / "started")})
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
    ) as parent:
        assert parent.stdout is not None
        try:
            pid = int(parent.stdout.readline())
            wait_for((tmp_path / "started").exists)
        finally:
            parent.send_signal(signal.SIGKILL)
    wait_until_gone(pid, 10)


def test_an_idle_runner_closes_its_engine_when_stdin_ends(
    open_session: OpenSession, streams: list[ProcessStream]
) -> None:
    open_session()
    streams[0].close()
    assert "fake engine closed" in streams[0].stderr_tail()


def test_a_runner_does_not_need_the_folder_it_was_started_in(tmp_path: Path) -> None:
    """A file there that is called like a standard module must not be imported."""
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')")
    argv = [sys.executable, "-P", "-m", "device_agents.runner"]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, cwd=tmp_path, env=local_environment({}), check=False, timeout=60
    )
    assert done.returncode == 0


def test_close_is_answered_before_the_runner_ends(transport: LocalTransport) -> None:
    client = RunnerClient(transport.open_stream(FAKE_RUNNER, {}))
    client.call(Close(), Closed, Deadline(30))
    client.close(Deadline(5))
