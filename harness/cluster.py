"""Ray itself: start a private one on this machine, or join the lab's."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType

import ray
from ray._private import node, parameter, ray_constants
from ray._private.services import find_node_ids

from device_agents import scratch
from device_agents.errors import InfrastructureError
from harness.errors import ClusterLost
from harness.hosting import token
from harness.hosting.head import connect
from harness.reaching import CONNECT_S
from harness.this_machine import OBJECT_STORE_BYTES

# Ray has Unix sockets in kvfarm-ray-PID-RANDOM/session_DATE_TIME_PID/sockets/plasma_store, up to 91
# characters with PIDs of six digits; the kernel allows 107 in all.
_LONGEST_FOLDER = 16
NAMESPACE = "kvfarm"  # of named actors


class RayConnection:
    """Ray, started or joined by ``ensure_ray``. ``close`` undoes just what ``ensure_ray`` did."""

    def __init__(self, *, joined: bool, ours: bool, folder: Path | None = None) -> None:
        self.joined = joined  # a cluster that outlives us
        self._ours = ours
        self._after = ExitStack()  # what is undone when Ray has ended
        if folder is not None:
            self._after.callback(shutil.rmtree, folder, ignore_errors=True)
            self._after.enter_context(token.own(folder))

    @property
    def shared(self) -> bool:
        """Whether others may be using it: anyone in a joined cluster, or other code of this process."""
        return self.joined or not self._ours

    @property
    def address(self) -> str:
        """HOST:PORT for other processes to join."""
        address: str = ray.get_runtime_context().gcs_address
        return address

    def check_alive(self) -> None:
        """Raises ClusterLost: the node of this process, or the head that would know it, is dead."""
        found = list[bool]()

        def look() -> None:
            with contextlib.suppress(Exception):  # Ray raises a dozen unrelated classes
                mine = ray.get_runtime_context().get_node_id()
                found.extend(node["Alive"] for node in ray.nodes() if node["NodeID"] == mine)

        # Without its head Ray waits for a minute, and then ends the process.
        thread = threading.Thread(target=look, name="ray", daemon=True)
        thread.start()
        thread.join(CONNECT_S)
        if not any(found):
            raise ClusterLost("Ray's node or head has died; go on in another process: `kvfarm resume --last`")

    def close(self) -> None:
        """Leave the cluster, or stop the Ray that was started here; a second time does nothing."""
        ours, self._ours = self._ours, False
        if ours:
            ray.shutdown()
        self._after.close()

    def __enter__(self) -> RayConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ensure_ray(address: str | None = None) -> RayConnection:
    """Ray for this process: the one that runs in it already, else the cluster at ``address``, else a new one.

    A new one serves this machine only: it listens on the loopback interface, has no dashboard,
    reports nothing home, and ends with ``close`` or with this process.

    Raises:
        NotAuthenticated: the cluster refuses our token. VersionMismatch: it has another Ray, Python or
            kvfarm. DeadlineExceeded: something at ``address`` does not answer. InfrastructureError: no
            cluster there, this machine has no node of it, or Ray does not start.
    """
    if ray.is_initialized():
        return RayConnection(joined=address is not None, ours=False)
    prepare()
    return _join(address) if address is not None else _start()


def prepare() -> None:
    """What Ray reads when it starts processes; what the user has set stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a FutureWarning
    # Ray's own choice is 15, which runners inherit: all else on the machine would come before what is timed.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray's own choice is a worker for each core before anybody wants one, 0.7 s of CPU each; we have two.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # A worker that ends would kill the keepers of phones and adb servers, which end by themselves and tidy.
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")


def _join(address: str) -> RayConnection:
    what = f"could not join the Ray cluster at {address}"
    head = connect(address, what).address
    if not find_node_ids():  # else Ray looks for one for a minute
        raise InfrastructureError(
            f"{what}: this machine has no Ray node; `kvfarm join {address} --no-devices` here, in another "
            "terminal or as a service"
        )
    try:
        with quietly(), _sigterm_kept(), loopback_only() if head.loopback else nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises a dozen unrelated classes, bare Exception among them
        raise InfrastructureError(
            f"{what}: {_first_line(error)} (here: Ray {ray.__version__}, Python {sys.version.split()[0]})"
        ) from error
    return RayConnection(joined=True, ours=True)


def _start() -> RayConnection:
    folder = new_folder()
    connection = RayConnection(joined=False, ours=True, folder=folder)
    try:
        with quietly(), _sigterm_kept(), loopback_only(), _few_processes():
            ray.init(
                address="local",  # never one that happens to run here
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                num_cpus=os.cpu_count(),
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
                _node_ip_address="127.0.0.1",
            )
        found = ray.util.get_node_ip_address()
        if found != "127.0.0.1":
            raise InfrastructureError(
                f"Ray {ray.__version__} listens on {found} and not on 127.0.0.1; refusing to open servers to "
                "the network. Install a Ray that kvfarm was tested with (see constraints.txt)"
            )
    except InfrastructureError:
        connection.close()
        raise
    except Exception as error:  # Ray raises a dozen unrelated classes, bare Exception among them
        connection.close()
        raise InfrastructureError(f"could not start Ray {ray.__version__}: {_first_line(error)}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def new_folder() -> Path:
    """A new temporary folder for Ray; those of processes that were killed are removed on the way."""
    base = tempfile.gettempdir()
    base = base if len(base) <= _LONGEST_FOLDER else "/tmp"
    for each in {base, tempfile.gettempdir()}:
        scratch.remove_abandoned(Path(each))
    return Path(tempfile.mkdtemp(prefix=scratch.named(scratch.RAY), dir=base))


@contextmanager
def loopback_only() -> Iterator[None]:
    """Make Ray's servers listen on 127.0.0.1 only, and find a head node that does.

    By default Ray replaces a loopback ``_node_ip_address`` by this machine's public one, and then
    listens on every interface. It does not where RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER is off, but
    reads that variable when it is imported, which may have been long ago; hence the constant.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _few_processes() -> Iterator[None]:
    """Start nothing that only a cluster, a web page or a reader of Ray's logs needs: 0.5 s of CPU each.

    The autoscaler's monitor has no other node to ask for, what the log monitor reads goes to nobody where
    ``log_to_driver`` is off, and ``include_dashboard=False`` starts the dashboard's server all the same.
    ``ray.init`` has no option for any of them, hence its classes.
    """
    parameters, server = parameter.RayParams, node.Node.start_api_server

    parameter.RayParams = partial(parameters, include_log_monitor=False, no_monitor=True)
    node.Node.start_api_server = lambda self, **_: None
    try:
        yield
    finally:
        parameter.RayParams, node.Node.start_api_server = parameters, server


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Whatever the program does at SIGTERM it still does after the body, which is Ray's: that would raise
    SystemExit wherever it is, and Hypothesis takes one for a failure of the property.

    Who has no handler of their own gets Ray's, which ends the process in order.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def quietly() -> Iterator[None]:
    """Ray's advice is not for our users, and must not become an error under ``-W error``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
