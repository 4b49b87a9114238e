"""What is wrong with this machine and with every device, and what to do: rows for ``kvfarm doctor``.

Each question has a deadline and runs beside the others. Nothing is changed and nothing leased; virtual
phones are started for it, apart from those of a run, and stopped again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from device_agents.adb.connection import AdbServer
from device_agents.adb.programs import diagnose_adb
from device_agents.api import Finding
from device_agents.blobs import BlobStore
from device_agents.bundle.lock import ABIS, Abi, parse_abi
from device_agents.bundle.ready import ready
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError
from device_agents.lab_agent import make_device
from device_agents.lab_types import AgentBudgets
from device_agents.virtual import possible
from device_agents.virtual.rootfs import native_abi
from harness import choosing, discovery, inventory, this_machine
from harness.discovery import PassedOver
from harness.errors import HarnessError
from harness.inventory import LOCAL_LAB, DeviceEntry, Inventory

Report = Callable[[str, int, int], None]
Look = Callable[[Deadline], Iterable[Finding]]

_LOOK_S = 90.0  # of what has no other deadline: an archive's lists take 5 s, over a slow network a minute
_SIDE_BY_SIDE = 8


@dataclass(frozen=True)
class Row:
    """where: a part of this machine, or a device."""

    where: str
    finding: Finding


@dataclass(frozen=True)
class Patients:
    """The devices to look at, by name. amiss: what is known to be wrong before one of them is asked."""

    devices: dict[str, DeviceEntry]
    inventory: Inventory
    amiss: tuple[Row, ...] = ()

    @property
    def phones(self) -> bool:
        """Whether one of them is reached through the user's adb server."""
        return any(e.kind == "android" and not _is_virtual(e) for e in self.devices.values())

    @property
    def virtual(self) -> set[Abi]:
        """ABIs of the virtual phones among them."""
        found = {_abi(entry) for entry in self.devices.values() if _is_virtual(entry)}
        return {abi for abi in found if abi is not None}


def find_patients(selection: str | None, farm_file: Path | None) -> Patients:
    """The devices of ``selection``; None: every one of the farm file and every phone that adb knows."""
    try:
        known = inventory.load(farm_file)
    except HarnessError as error:
        return Patients({}, Inventory(), (Row("farm file", Finding("devices", "fix", str(error))),))
    if selection is None:
        return _everyone(known)
    try:
        meant = choosing.read(selection, known)
    except HarnessError as error:
        return Patients({}, known, (Row("devices", Finding("selection", "fix", str(error))),))
    devices = {name: meant.inventory.device(name) for name in meant.names}
    passed = meant.passed_over if meant.condition is None else ()
    return Patients(devices, meant.inventory, tuple(_unready(passed, known)))


def diagnose(patients: Patients, address: str | None, cache: Path, report: Report) -> tuple[Row, ...]:
    """Every row, in the order of their places; of a place without trouble there is a row too.

    address: of the Ray cluster, without which only devices at this machine can be asked. cache: where
    kvfarm keeps its things here.
    """
    joined: tuple[Finding, ...] = ()
    if address is not None:  # first, for whoever joins what is no cluster waits for minutes
        report("joining the Ray cluster", 0, 1)
        joined = this_machine.ray_starts(address, Deadline(_LOOK_S))
        report("joining the Ray cluster", 1, 1)
    with _examiner(patients, address, joined) as ask:
        looks = [*_machine_looks(patients, joined, cache)]
        looks += [(name, True, ask(name, entry)) for name, entry in patients.devices.items()]
        rows: dict[int, list[Row]] = {}
        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            waiting = {
                pool.submit(_looked, look, needed): (number, where)
                for number, (where, needed, look) in enumerate(looks)
            }
            report(f"looking at this machine and {len(patients.devices)} devices", 0, len(looks))
            for done, future in enumerate(as_completed(waiting), 1):
                number, where = waiting[future]
                rows[number] = [Row(where, finding) for finding in future.result()]
                report(f"looking at this machine and {len(patients.devices)} devices", done, len(looks))
    return (*(row for number in sorted(rows) for row in rows[number]), *patients.amiss)


# -- inside -------------------------------------------------------------------------------


def _everyone(known: Inventory) -> Patients:
    listed = dict(known.devices)
    for pool in known.pools:  # which may name virtual phones that are nowhere else
        listed |= {name: known.device(name) for name in inventory.members(pool, known)}
    here = {name: e for name, e in listed.items() if e.lab == LOCAL_LAB}
    found = discovery.find(known, start=Patients(here, known).phones)
    return Patients({**listed, **found.phones}, known, tuple(_unready(found.unready, known)))


def _unready(passed: Iterable[PassedOver], known: Inventory) -> Iterator[Row]:
    """Phones that adb knows and that cannot be used. One that is listed says so itself."""
    listed = {entry.options.get("serial") for entry in known.devices.values()}
    for each in passed:
        if each.name not in {*listed, inventory.ADB}:
            state, _, do = each.reason.partition("; ")
            yield Row(each.name, Finding("adb state", "fix", state, do))


def _machine_looks(
    patients: Patients, joined: tuple[Finding, ...], cache: Path
) -> Iterator[tuple[str, bool, Look]]:
    """Where, whether these devices need it, and the question. joined: what is known of Ray, if anything."""
    yield "this host", True, lambda within: this_machine.host(cache)
    yield "Ray", True, lambda within: joined or this_machine.ray_starts(None, within)
    yield "reference", True, this_machine.reference
    yield "adb", patients.phones, lambda within: diagnose_adb(AdbServer.default(), within)
    virtual = patients.virtual
    bundles = virtual | ({"arm64-v8a"} if patients.phones else set())
    for abi in ABIS:
        yield "bundle", abi in bundles, _bundle_look(abi, cache / "bundles", abi in bundles)
    yield "virtual phones", bool(virtual), lambda within: [possible.namespaces(within)]
    for abi in ABIS:
        yield "virtual phones", abi in virtual, _parts_look(abi, cache, abi in virtual)


def _bundle_look(abi: Abi, cache: Path, needed: bool) -> Look:
    return lambda within: [ready(abi, cache, needed, within)]


def _parts_look(abi: Abi, cache: Path, needed: bool) -> Look:
    return lambda within: [possible.parts(abi, cache, needed, within)]


def _looked(look: Look, needed: bool) -> list[Finding]:
    try:
        found = list(look(Deadline(_LOOK_S)))
    except (InfrastructureError, OSError) as error:
        found = [Finding("answer", "fix", str(error))]
    return found if needed else [_not_needed(finding) for finding in found]


def _not_needed(finding: Finding) -> Finding:
    if finding.state == "ok":
        return finding
    return replace(finding, state="note", do=f"none of these devices needs it; else: {finding.do}")


@contextmanager
def _examiner(
    patients: Patients, address: str | None, joined: tuple[Finding, ...]
) -> Iterator[Callable[[str, DeviceEntry], Look]]:
    """How to ask a device: through the lab agents of a cluster, else here, without Ray."""
    with ExitStack() as stack:
        if address is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvfarm-doctor-"))
            store = BlobStore(Path(folder) / "lab")
            yield lambda name, entry: lambda within: _asked_here(name, entry, store)
        elif joined[0].state == "fix":
            reason = Finding("lab host", "fix", f"not asked: no Ray at {address}", "see the rows of Ray")
            yield lambda name, entry: lambda within: [reason]
        else:
            labs = {entry.lab for entry in patients.devices.values()}
            agents = {lab: _agent(lab, patients, address, stack) for lab in sorted(labs)}
            yield lambda name, entry: lambda within: agents[entry.lab](name)


def _agent(
    lab: str, patients: Patients, address: str, stack: ExitStack
) -> Callable[[str], Iterable[Finding]]:
    """How to ask a device of one lab host, which may be missing."""
    from harness.farm import Farm

    names = tuple(name for name, entry in patients.devices.items() if entry.lab == lab)
    try:
        return stack.enter_context(Farm(patients.inventory, names, address)).diagnose
    except InfrastructureError as error:
        reason = Finding("lab host", "fix", str(error), "see the rows of Ray, and --farm-address")
        return lambda name: [reason]


def _asked_here(name: str, entry: DeviceEntry, store: BlobStore) -> Iterable[Finding]:
    if entry.lab != LOCAL_LAB:
        return [Finding("lab host", "fix", f"it is at {entry.lab}", "give --farm-address of its Ray cluster")]
    device = make_device(entry.config(name), store)
    try:
        return device.diagnose(Deadline(AgentBudgets().diagnose_s))
    finally:
        device.close()


def _is_virtual(entry: DeviceEntry) -> bool:
    return entry.options.get("virtual") == "true"


def _abi(entry: DeviceEntry) -> Abi | None:
    """Of a virtual phone; None where the phone itself will say what is wrong with it."""
    with suppress(InfrastructureError):
        return parse_abi(entry.options["abi"]) if "abi" in entry.options else native_abi()
    return None
