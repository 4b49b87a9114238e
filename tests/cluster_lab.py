"""A lab of several machines on this one: namespaces with addresses, processes and caches of their own.

::

    with ClusterLab(("rack1", "rack2")) as lab:
        lab.kvfarm("head", "hosts", "--json")
        lab.cut("rack2")          # frames vanish, as when somebody pulls the switch's cable
        lab.mend("rack2")
        lab.kill("rack2")         # the whole machine, at once
        lab.start("rack2")

Each machine has network, PID, mount and UTS namespaces, so that Ray, leases and adb take it for one; files
are those of this machine, and HOME, caches and temporary files its own. A bridge in a namespace of its own
joins them; nothing of the real network is touched. Everything ends with this process, also when it is killed
(PR_SET_PDEATHSIG), and with the ``with``. Needs root, and util-linux and iproute2; see ``missing``.

``python -m tests.cluster_lab`` shows it all, and takes a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from device_agents.deadline import Deadline

HEAD = "head"
NETWORK = "10.77.0"
PORT = 6379
_TOOLS = ("unshare", "nsenter", "setpriv", "ip")
_START_S, _COMMAND_S, _END_S = 120.0, 60.0, 30.0
# PID 1 of each machine: it has to take the exit codes of orphans.
_INIT = "while :; do sleep 3600 & wait; done"
_SPACES = ("--net", "--pid", "--mount", "--uts")


def missing() -> str:
    """Why there can be no such lab here; "": there can."""
    if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"sought {', '.join(absent)}; install util-linux and iproute2"
    command = ["unshare", *_SPACES, "--fork", "--mount-proc", "--kill-child", "ip", "link", "add", "br0"]
    done = subprocess.run([*command, "type", "bridge"], capture_output=True, text=True, timeout=_COMMAND_S)
    return (
        "" if done.returncode == 0 else f"namespaces and bridges are not allowed here: {done.stderr.strip()}"
    )


class Machine:
    """Namespaces that live as long as ``init``. pid: of its first process, as seen from outside."""

    def __init__(self, name: str, address: str, folder: Path, temporary: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        temporary.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *_SPACES, "--fork", "--mount-proc"]
        # It complains when it is killed.
        self._unshare = subprocess.Popen(
            [*command, "--kill-child", "sh", "-c", _INIT], stderr=subprocess.DEVNULL
        )
        self.pid = _child_of(self._unshare.pid)
        self.enter(("hostname", name))
        self.environment = dict(os.environ) | {
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "TMPDIR": str(temporary),
        }
        for variable in ("KVFARM_LEASES", "ANDROID_ADB_SERVER_PORT", "KVFARM_ADDRESS"):
            self.environment.pop(variable, None)

    def enter(self, command: Sequence[str], spaces: Sequence[str] = ("--net", "--uts")) -> None:
        """A short command in some of its namespaces. Raises CalledProcessError, with what it said."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.pid), *spaces, *command],
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: {done.stderr.strip()}")

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """A program of this machine, in the folder of its own; ``signal_inside`` reaches it."""
        inside = ["nsenter", "--target", str(self.pid), *_SPACES, f"--wd={self.folder}", *command]
        return subprocess.Popen(inside, env=self.environment, text=True, **options)

    def kill(self) -> None:
        """All its processes at once; network and mounts go with them."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait(_END_S)


class ClusterLab:
    """names: of the hosts. farm: text of a farm.toml for all of them; "": each offers itself.

    parts: a .kvfarm with bundles and file systems of virtual phones, for there is no network to fetch them.
    """

    def __init__(self, names: Sequence[str] = ("rack1", "rack2"), farm: str = "", parts: Path | None = None):
        self.names = tuple(names)
        self.address = f"{NETWORK}.1:{PORT}"
        self._farm, self._parts = farm, parts
        self._machines: dict[str, Machine] = {}
        self._switch: Machine | None = None
        self._services: dict[str, subprocess.Popen[str]] = {}
        # Short, for Ray's sockets are below it; see harness.cluster.
        self.folder = Path(tempfile.mkdtemp(prefix="k", dir="/tmp"))

    def __enter__(self) -> ClusterLab:
        try:
            self._switch = Machine("switch", "", self.folder / "switch", self.folder / "0")
            self._on_switch("add", "br0", "type", "bridge")
            self._on_switch("set", "br0", "up")
            for name in (HEAD, *self.names):
                self.start(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all, in no order: machines are pulled out."""
        for machine in [*self._machines.values(), *([self._switch] if self._switch else [])]:
            machine.kill()
        self._machines, self._switch = {}, None
        for service in self._services.values():
            service.wait(_END_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, name: str) -> None:
        """Plug the machine in and start what it is for: the head, or a lab host that joins it."""
        number = 1 + (HEAD, *self.names).index(name)
        folder, temporary = self.folder / name, self.folder / str(number)
        machine = self._machines[name] = Machine(name, f"{NETWORK}.{number}", folder, temporary)
        self._on_switch("add", name, "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid))
        self._on_switch("set", name, "master", "br0", "up")
        for command in ("link set lo up", f"addr add {machine.address}/24 dev eth0", "link set eth0 up"):
            machine.enter(("ip", *command.split()))
        if name == HEAD:
            self._serve(name, "head of a lab", "head", "--listen", self.address)
            return
        shutil.copytree(self.folder / HEAD / "config", machine.folder / "config", dirs_exist_ok=True)
        if self._farm:
            (machine.folder / "farm.toml").write_text(self._farm)
        if self._parts is not None and not (machine.folder / "cache").exists():
            for kept, part in (("cache/kvfarm", "bundles"), (".kvfarm", "virtual")):
                (machine.folder / kept).mkdir(parents=True)
                (machine.folder / kept / part).symlink_to(self._parts / part)
        self._serve(name, "has joined", "join", self.address, "--name", name)

    def kill(self, name: str) -> None:
        """The power cord."""
        self._machines.pop(name).kill()
        self._services.pop(name).wait(_END_S)

    def cut(self, name: str) -> None:
        """From now on nothing gets to the machine or away from it; it does not notice."""
        self._on_switch("set", name, "nomaster")

    def mend(self, name: str) -> None:
        self._on_switch("set", name, "master", "br0")

    def popen(self, name: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        """A program on a machine; clients run on the head's, for a client needs a Ray node beside it."""
        return self._machines[name].popen(command, **options)

    def kvfarm(
        self, name: str, *arguments: str, seconds: float = _COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """``kvfarm`` on a machine, told where the head is, to its end."""
        command = (sys.executable, "-c", "from harness.cli import main; main()", *arguments)
        self._machines[name].environment["KVFARM_ADDRESS"] = self.address
        process = self.popen(name, *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            signal_inside(process, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def hosts(self) -> dict[str, dict[str, Any]]:
        """What `kvfarm hosts` says, by name."""
        said = self.kvfarm(HEAD, "hosts", "--json")
        return {row["name"]: row for row in json.loads(said.stdout)["hosts"]}

    def wait(self, true: Callable[[dict[str, dict[str, Any]]], bool], seconds: float = _START_S) -> float:
        """Until it is true of ``hosts``; returns the seconds that took. Raises DeadlineExceeded."""
        began, deadline, pause = time.monotonic(), Deadline(seconds), threading.Event()
        while not true(found := self.hosts()):
            deadline.check(f"hosts are { ({name: row['state'] for name, row in found.items()}) }")
            pause.wait(0.5)
        return time.monotonic() - began

    def log(self, name: str) -> str:
        """What `kvfarm head` or `join` there has said."""
        return (self._machines[name].folder / "kvfarm.log").read_text()

    def listening(self, name: str) -> list[str]:
        """Addresses that something on the machine listens on, with ports, in hexadecimal; see proc(5)."""
        files = ("/proc/net/tcp", "/proc/net/tcp6")
        process = self.popen(name, "cat", *files, stdout=subprocess.PIPE)
        rows = [line.split() for line in process.communicate(timeout=_COMMAND_S)[0].splitlines()]
        return sorted(row[1] for row in rows if row[3:4] == ["0A"])  # TCP_LISTEN

    # -- inside ---------------------------------------------------------------------------

    def _serve(self, name: str, when_ready: str, *arguments: str) -> None:
        machine = self._machines[name]
        command = (sys.executable, "-c", "from harness.cli import main; main()", *arguments)
        log = machine.folder / "kvfarm.log"
        with log.open("w") as out:
            self._services[name] = machine.popen(command, stdout=out, stderr=subprocess.STDOUT)
        deadline, pause = Deadline(_START_S), threading.Event()
        while when_ready not in log.read_text():
            if self._services[name].poll() is not None or deadline.expired:
                raise RuntimeError(f"{name} did not start:\n{log.read_text()}")
            pause.wait(0.05)

    def _on_switch(self, *words: str) -> None:
        assert self._switch is not None
        self._switch.enter(("ip", "link", *words), ("--net",))


def signal_inside(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """To the program that nsenter has started; nsenter itself hands on no signal."""
    with suppress(OSError, ValueError):
        os.kill(_child_of(process.pid), number)


def _child_of(pid: int) -> int:
    """Its only child, soon. Raises DeadlineExceeded, OSError: it has ended."""
    deadline, pause = Deadline(_COMMAND_S), threading.Event()
    while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            raise ProcessLookupError(f"process {pid} has ended")
        deadline.check(f"process {pid} has started nothing")
        pause.wait(0.01)
    return int(children[0])


def main() -> int:
    """A show of what the lab can do, with the seconds that each took."""
    if why := missing():
        print(why)  # noqa: T201
        return 1

    def say(what: str, began: float) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)  # noqa: T201

    began = time.monotonic()
    with ClusterLab() as lab:
        say("a head and two hosts are up", began)
        print(lab.kvfarm(HEAD, "hosts").stdout)  # noqa: T201
        done = lab.kvfarm(HEAD, "devices", "--farm-address", lab.address)
        print(done.stdout, done.stderr)  # noqa: T201
        lab.cut("rack2")
        say(f"rack2 is cut off; late after {lab.wait(lambda h: h['rack2']['state'] != 'ready'):.1f} s", began)
        lab.mend("rack2")
        say(f"mended; ready after {lab.wait(lambda h: h['rack2']['state'] == 'ready'):.1f} s", began)
        lab.kill("rack1")
        say(f"rack1 is killed; lost after {lab.wait(lambda h: h['rack1']['state'] == 'lost'):.1f} s", began)
        lab.start("rack1")
        say("rack1 has joined again", began)
        said = lab.kvfarm(HEAD, "drain", "rack1", "--wait", "5s")
        say(f"drained: {said.stderr.strip().splitlines()[-1]}", began)
        print(lab.kvfarm(HEAD, "hosts").stdout)  # noqa: T201
        lab.kill(HEAD)
        lab.start(HEAD)
        say(f"the head was killed and started again; hosts are back after {lab.wait(_all_back):.1f} s", began)
        print({name: lab.listening(name) for name in (HEAD, *lab.names)})  # noqa: T201
    say("all is gone", began)
    return 0


def _all_back(hosts: dict[str, dict[str, Any]]) -> bool:
    return [row["state"] in ("ready", "drained") for row in hosts.values()] == [True, True]


if __name__ == "__main__":
    sys.exit(main())
