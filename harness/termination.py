"""SIGTERM, as CI and `timeout` send it, ends a run like Ctrl-C: what was done is kept and reported."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import pytest


def end_in_order(config: pytest.Config) -> None:
    """From now on until pytest ends. A worker does nothing by itself: its controller tells it the end."""
    if threading.current_thread() is not threading.main_thread():
        return

    def ignore(number: int, frame: FrameType | None) -> None:
        pass  # and not SIG_IGN, which what we start would inherit

    def interrupt(number: int, frame: FrameType | None) -> None:
        # `timeout` sends it to us and then to our group; the second must not cut the report short.
        signal.signal(signal.SIGTERM, ignore)
        session = config.pluginmanager.get_plugin("session")
        if session is not None:
            session.shouldstop = "SIGTERM"  # should somebody swallow what follows
        raise KeyboardInterrupt("SIGTERM")

    worker = hasattr(config, "workerinput")
    before = signal.signal(signal.SIGTERM, ignore if worker else interrupt)

    def restore() -> None:
        signal.signal(signal.SIGTERM, before)

    config.add_cleanup(restore)


def is_behind(error: BaseException | None) -> bool:
    """Whether ``error`` comes of this process being ended, by Ctrl-C, SIGTERM or exit: not a test's fault.

    Hypothesis, interrupted at the wrong moment, fails an assertion of its own while it tidies up.
    """
    seen = list[BaseException]()  # an error that was carried past Hypothesis may stand behind itself
    while error is not None and not any(error is each for each in seen):
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False
