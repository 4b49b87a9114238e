"""The suite that a night starts ends with the night, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.cli.nightly import _terminable
from harness.nightly import child

STUCK = """
import pathlib, time
def test_stuck():
    pathlib.Path("began").touch()
    try:
        time.sleep(100)
    finally:
        pathlib.Path("cleaned").touch()
"""


def test_it_is_interrupted_in_order_when_the_pipe_ends(tmp_path: Path) -> None:
    (tmp_path / "test_stuck.py").write_text(STUCK)
    theirs, ours = os.pipe()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        child.__name__,
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    with subprocess.Popen(
        [*command, "--rootdir=.", "test_stuck.py"],
        cwd=tmp_path,
        env=environment | {child.PIPE: str(theirs)},
        pass_fds=(theirs,),
        # As whoever starts a night from a shell's background may have it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ) as process:
        os.close(theirs)
        try:
            until = time.monotonic() + 60
            while not (tmp_path / "began").exists():
                assert time.monotonic() < until
                time.sleep(0.05)
            os.close(ours)
            assert process.wait(30) == pytest.ExitCode.INTERRUPTED
        finally:
            process.kill()
    assert (tmp_path / "cleaned").exists()


def test_sigterm_is_as_ctrl_c_for_as_long_as_a_night_lasts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
