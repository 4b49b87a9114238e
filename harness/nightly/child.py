"""A pytest plugin for the suite that a night starts: it ends with the night, and does its drill.

The night holds the other end of a pipe. When the night is gone, however it went, the pipe ends, and this run
is interrupted: pytest then gives devices back and stops what it started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

PIPE, MUTANT = "KVFARM_NIGHT_PIPE", "KVFARM_NIGHT_MUTANT"
GRACE_S = 60.0  # to end in order


def pytest_configure(config: pytest.Config) -> None:
    if name := os.environ.get(MUTANT):
        from harness.nightly import drill

        stack = contextlib.ExitStack()
        stack.enter_context(drill.suite(name))
        config.add_cleanup(stack.close)
    if (pipe := os.environ.get(PIPE)) and not hasattr(config, "workerinput"):
        # Whoever started the night may have had SIGINT ignored, and we inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_end_with, args=(int(pipe),), name="night", daemon=True).start()


def _end_with(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(GRACE_S)
    os._exit(int(pytest.ExitCode.INTERRUPTED))
