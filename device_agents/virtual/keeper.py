"""Runs one server on a free port of 127.0.0.1, and kills it when whoever asked for it is gone.

`python keeper.py PARENT FOLDER ARGV...`, {listener} in ARGV being the descriptor of the listening socket:
made here and handed over, so that no other port and no other interface can be meant. The port comes on
stdout, five digits and a newline. The server ends when stdin ends or the process PARENT does, however
that died: by SIGTERM, then SIGKILL; FOLDER, its own, is removed then. Killed itself, it takes the server
along. Standard library only, run as a file: imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys

_GRACE_S = 1.0
_PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None)  # loaded here, for the child of a fork should do little


def main() -> int:
    parent = os.pidfd_open(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        descriptor = listener.fileno()
        os.write(1, b"%05d\n" % listener.getsockname()[1])
        child = subprocess.Popen(
            [word.replace("{listener}", str(descriptor)) for word in sys.argv[3:]],
            stdin=subprocess.DEVNULL,  # it must not hold ours open, nor read from it
            stdout=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        )
    try:
        ended = os.pidfd_open(child.pid)
        ready, _, _ = select.select([0, parent, ended], [], [])
        return child.wait() if ended in ready else 0
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        shutil.rmtree(sys.argv[2], ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
