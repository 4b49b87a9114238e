"""How soon a lab knows that a phone was plugged in or pulled out: ``python -m bench.hot_plug``.

A head and a joined host on this machine, as people start them, with an adb server of their own (the real
adb). A virtual phone is connected to that server and disconnected again, at random moments. The clock runs
from before the request until the host's record in the head's store, which `kvfarm devices` reads, says so.
``devices --watch`` looks every second on top. Prints each round, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.virtual import VirtualPhone, load_profile
from device_agents.virtual.adb import PrivateAdbServer
from device_agents.virtual.rootfs import default_cache, native_abi, prepare
from harness.hosting import token
from harness.hosting.head import Head, connect
from harness.hosting.records import hosts
from harness.provenance import provenance

BOUND_S = 5.0
_SECONDS = 60.0
_LOOK_S = 0.01
_KVFARM = (sys.executable, "-c", "from harness.cli import main; main()")


def main() -> int:
    """Exit code 0: every round was within the bound; 1: not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    took: dict[str, list[float]] = {"plugged in": [], "pulled out": []}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, cache = Path(name), default_cache()
        prepare(native_abi(), cache, Deadline(300))
        server = stack.enter_context(PrivateAdbServer())
        phone = stack.enter_context(
            VirtualPhone("phone", load_profile(), native_abi(), folder / "phones", cache)
        )
        address = f"127.0.0.1:{_free_port()}"
        _prepare_environment(folder, server.port, address)
        stack.enter_context(_serving(folder, "head of a lab", "head", "--listen", address))
        stack.enter_context(_serving(folder, "has joined", "join", address, "--name", "rack1"))
        head = connect(address, "the measurement could not look")
        draw, pause = random.Random(1), threading.Event()
        for number in range(rounds):
            pause.wait(draw.uniform(0.0, 2.0))
            took["plugged in"].append(_seconds(lambda: server.connect(phone.address, Deadline(20)), head, 1))
            pause.wait(draw.uniform(0.0, 2.0))
            took["pulled out"].append(
                _seconds(lambda: server.disconnect(phone.address, Deadline(20)), head, 0)
            )
            said = ", ".join(f"{what} {each[-1]:.2f} s" for what, each in took.items())
            sys.stdout.write(f"round {number + 1}: {said}\n")
            sys.stdout.flush()
    table = {
        what: {"median_s": round(statistics.median(each), 2), "most_s": round(max(each), 2)}
        for what, each in took.items()
    }
    sys.stdout.write(json.dumps({"rounds": rounds, **table, "provenance": provenance()}) + "\n")
    return 0 if max(map(max, took.values())) <= BOUND_S else 1


def _seconds(change: Callable[[], object], head: Head, phones: int) -> float:
    """From before ``change`` until the host's record has so many phones."""
    deadline, pause, began = Deadline(_SECONDS), threading.Event(), time.monotonic()
    change()
    while _phones(head) != phones:
        if deadline.expired:
            raise TimeoutError(f"the host's record does not have {phones} phones after {_SECONDS:g} s")
        pause.wait(_LOOK_S)
    return time.monotonic() - began


def _phones(head: Head) -> int:
    """That adb says are there, at all hosts."""
    return sum(device.plugged == "device" for host in hosts(head) for device in host.record.devices.values())


def _prepare_environment(folder: Path, adb_port: int, address: str) -> None:
    """Of this process and of those that it starts: a lab that nobody else knows."""
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        del os.environ[name]
    os.environ |= {
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "ANDROID_ADB_SERVER_PORT": str(adb_port),
        "KVFARM_ADDRESS": address,
        "KVFARM_LEASES": str(folder / "leases"),
        token.PATH: str(folder / "config" / "kvfarm" / "token"),
    }


@contextmanager
def _serving(folder: Path, when_ready: str, *arguments: str) -> Iterator[None]:
    log, pause, deadline = folder / f"{arguments[0]}.log", threading.Event(), Deadline(_SECONDS)
    with log.open("w") as out:
        process = subprocess.Popen([*_KVFARM, *arguments], cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    try:
        while when_ready not in log.read_text():
            if process.poll() is not None or deadline.expired:
                raise RuntimeError(f"kvfarm {arguments[0]} did not begin: {log.read_text()}")
            pause.wait(0.1)
        yield
        process.terminate()
        process.wait(_SECONDS)
    finally:
        process.kill()
        process.wait(_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
