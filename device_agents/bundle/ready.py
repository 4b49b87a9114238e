"""Whether a bundle is made, or can be made on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from device_agents.api import Finding
from device_agents.apt import missing_tools
from device_agents.bundle import debian
from device_agents.bundle.builder import built, lacking_debs
from device_agents.bundle.lock import PLATFORMS, Abi
from device_agents.deadline import Deadline
from device_agents.errors import BundleError
from device_agents.scratch import APT, owned_folder

_MIB = 1 << 20


def ready(abi: Abi, cache: Path, ask_archive: bool, deadline: Deadline) -> Finding:
    """cache: as for ``build``. ask_archive: whether to see, over the network, that the locked packages of
    a bundle that is not there can still be had."""
    what, make = f"for {abi}", f"kvfarm bundle --abi {abi}"
    try:
        bundle = built(abi, cache)
        if bundle is not None:
            size = bundle.manifest.size / _MIB
            return Finding(what, "ok", f"made: {bundle.id[:16]}, {len(bundle.files)} files, {size:,.0f} MiB")
        pip = "" if importlib.util.find_spec("pip") else "pip (python -m ensurepip)"
        if missing := ", ".join(filter(None, (missing_tools(), pip))):
            found = f"not made; to make it there is no {missing} here"
            return Finding(what, "fix", found, "install them, or copy .kvfarm/bundles from another machine")
        if not ask_archive:
            return Finding(what, "note", "not made yet", f"the first run that needs it makes it, or {make}")
        gone = _gone(abi, cache, deadline)
    except BundleError as error:
        return Finding(what, "fix", str(error), "see that `apt-get update` works on this machine")
    if gone:
        text = f"not made; the mirrors no longer have what lock.json pins: {', '.join(gone)}"
        return Finding(what, "fix", text, f"{make} --relock, and commit lock.json")
    return Finding(what, "ok", f"not made yet, its packages can be had; the first run makes it, or {make}")


def _gone(abi: Abi, cache: Path, deadline: Deadline) -> list[str]:
    """Those pinned that are not kept here and of which the mirrors have another version."""
    lacking = lacking_debs(abi, cache)
    if not lacking:
        return []
    with owned_folder(APT) as scratch:
        names = tuple(package.name for package in lacking)
        known = debian.newest(PLATFORMS[abi].debian, names, Path(scratch), deadline)
        there = {package.name: package.version for package in known}
    return [f"{p.name} {p.version} (now {there[p.name]})" for p in lacking if there[p.name] != p.version]
