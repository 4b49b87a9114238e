"""A real runner process around a fake engine that can be told, by a program's first token, to misbehave.

    python fake_runner.py

The engine answers a Prefill with rows of logits that hold the token, so that tests can tell answers apart.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from device_agents import runner
from kvengine.errors import ArtifactError, InvalidRequest, InvalidToken
from kvengine.program import (
    Measurement,
    Observation,
    Operation,
    OperationError,
    Prefill,
    Program,
    Sample,
    Workload,
)
from kvengine.recipe import SessionRecipe
from kvengine.session import SessionInfo

VOCAB = 5
REFUSED_FOLDER = "no-such-artifact"

# First tokens that make trouble.
DIE, HANG, GARBAGE, HALF_FRAME_HANG, HALF_FRAME_DIE, PRINT, HUGE, CLOSE_STDOUT = range(100, 108)
CRASH, REFUSE, ORPHAN_CHILD, STALE_REPLY, WRONG_COUNT, FLOOD_STDERR, EXIT_7, UNKNOWN_ERROR = range(108, 116)

_WIRE = os.dup(1)  # the true stdout, past the runner's own precautions


class UnheardOf(InvalidRequest):
    """An engine error that the other side does not know."""


class FakeEngine:
    def __init__(self, folder: str, recipe: SessionRecipe) -> None:
        if folder == REFUSED_FOLDER:
            raise ArtifactError(f"sought artifact.json in {folder}, found none")
        self._recipe = recipe

    @property
    def info(self) -> SessionInfo:
        note = os.environ.get("FAKE_NOTE", "")
        return SessionInfo("fake", self._recipe, 1.5, "0", "0", "0", {"CPUExecutionProvider": 3}, (note,))

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        observations = tuple(_observe(operation) for operation in program.operations)
        first = program.operations[0]
        if isinstance(first, Prefill):
            misbehave(first.tokens[0])
            if first.tokens[0] == WRONG_COUNT:
                return observations[:-1]
        return observations

    def run_workload(self, workload: Workload) -> Measurement:
        samples = (Sample(1.25, (0.5, 0.75), (7, 8)),) * workload.repeats
        return Measurement(samples, 1.5, 1000, 2000, {"CPUExecutionProvider": 3}, 2)

    def close(self) -> None:
        sys.stderr.write("fake engine closed\n")


def _observe(operation: Operation) -> Observation:
    if not isinstance(operation, Prefill):
        empty = np.zeros((0, VOCAB), np.float32)
        return Observation((0,), empty, (), OperationError(InvalidToken.__name__, "sought 0..4"))
    rows = np.repeat(np.array(operation.tokens, np.float32)[:, None], VOCAB, axis=1)
    return Observation((len(operation.tokens),), rows)


def misbehave(how: int) -> None:
    sys.stderr.write("last words of the fake engine\n")
    sys.stderr.flush()
    if "FAKE_STARTED" in os.environ:
        Path(os.environ["FAKE_STARTED"]).touch()  # so that a test knows that work has begun
    match how:
        case 100:  # DIE
            os.kill(os.getpid(), signal.SIGKILL)
        case 101:  # HANG, deaf to SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            threading.Event().wait()
        case 102:  # GARBAGE
            os.write(_WIRE, b"Segmentation fault (core dumped), says the C library\n" * 10)
        case 103:  # HALF_FRAME_HANG
            os.write(_WIRE, b"KVFR\x01\x02")
            threading.Event().wait()
        case 104:  # HALF_FRAME_DIE
            os.write(_WIRE, b"KVFR\x01\x02")
            os._exit(3)
        case 105:  # PRINT
            sys.stdout.write("stray print\n")
            sys.stdout.flush()
            os.write(1, b"stray write of a C library\n")
            subprocess.run(["echo", "stray echo of a child"], check=True)
        case 106:  # HUGE
            os.write(_WIRE, huge_frame())
        case 107:  # CLOSE_STDOUT
            close_every_copy_of(_WIRE)
            threading.Event().wait()
        case 108:  # CRASH
            raise ZeroDivisionError("a bug in the engine")
        case 109:  # REFUSE
            raise InvalidRequest("a capacity of 0 makes no sense")
        case 110:  # ORPHAN_CHILD, which holds our pipes
            subprocess.Popen(["sleep", "300"], stdout=_WIRE, pass_fds=(_WIRE,))
            os._exit(4)
        case 111:  # STALE_REPLY
            os.write(_WIRE, stale_reply())
        case 113:  # FLOOD_STDERR
            for line in range(100_000):
                sys.stderr.write(f"warning {line} of a chatty library\n")
        case 114:  # EXIT_7
            os._exit(7)
        case 115:  # UNKNOWN_ERROR
            raise UnheardOf("what is this?")


def huge_frame() -> bytes:
    """A well-formed prelude that declares a terabyte."""
    import struct
    import zlib

    prelude = struct.pack("<4sBBHIIQI", b"KVFR", 1, 2, 0, 2, 10, 1 << 40, 0)
    return prelude + struct.pack("<I", zlib.crc32(prelude))


def stale_reply() -> bytes:
    from device_agents.frames import encode_frame
    from device_agents.messages import Closed, reply_frame

    return b"".join(encode_frame(reply_frame(Closed(), 1)))


def close_every_copy_of(descriptor: int) -> None:
    pipe = os.readlink(f"/proc/self/fd/{descriptor}")
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == pipe:
                os.close(int(name))
        except FileNotFoundError:
            continue  # the folder's own descriptor


if __name__ == "__main__":
    sys.exit(runner.main(FakeEngine))
