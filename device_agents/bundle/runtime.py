"""A user's own Python and onnxruntime in place of ours: how NNAPI, XNNPACK or QNN reach the engine.

The folder needs a ``run.sh``: ``sh run.sh ARGUMENTS`` starts Python 3.11 or newer with
ARGUMENTS, and leaves stdin, stdout, the environment and PYTHONPATH's entries as they are;
numpy and onnxruntime can be imported. It may hold the whole runtime, or just start one that
is on the device already (Termux). What it offers is probed on the device, never assumed.
Our modules are added as source, for its Python may be of any version.

    code/       kvengine and device_agents
    runtime/    the user's folder
    run.sh      ours; calls theirs
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import kvengine
from device_agents.bundle.builder import making, place
from device_agents.bundle.contents import own_sources
from device_agents.bundle.elf import machine_of
from device_agents.bundle.launcher import runtime_run_sh
from device_agents.bundle.lock import PLATFORMS, Abi
from device_agents.bundle.model import ENTRY, Bundle, seal
from device_agents.errors import BundleError


def bundle_of(runtime: Path, cache: Path, abi: Abi | None = None) -> Bundle:
    """abi: default what the binaries in ``runtime`` are for.

    Links in it are followed and become files.

    Raises:
        BundleError: no run.sh; binaries for another or several ABIs; none and no ``abi``; a
            link to nowhere or in a circle.
    """
    if not (runtime / ENTRY).is_file():
        raise BundleError(
            f"sought {runtime / ENTRY}, found none; "
            "it starts the runtime's Python with the arguments it is given"
        )
    cache = cache.absolute()
    with making(cache) as scratch:
        tree = scratch / "bundle"
        _copy_tree(runtime, tree / "runtime", ())
        found = _abi_of(tree / "runtime", runtime, abi)
        for module, source in own_sources().items():
            target = tree / "code" / module
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        (tree / ENTRY).write_text(runtime_run_sh())
        made = seal(tree, found, "user", {"kvfarm": kvengine.__version__}, (ENTRY,))
        return place(made, cache / "bundles" / made.id)


def _copy_tree(source: Path, target: Path, above: tuple[Path, ...]) -> None:
    real = source.resolve()
    if real in above:
        raise BundleError(f"{source} is a link in a circle, to {real}")
    target.mkdir(parents=True)
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
        path = Path(entry.path)
        try:
            if entry.is_dir():
                _copy_tree(path, target / entry.name, (*above, real))
            elif entry.is_file():
                shutil.copy(path, target / entry.name)
            else:
                raise BundleError(
                    f"sought files and folders only, found {path}, a special file or a dead link"
                )
        except OSError as error:
            raise BundleError(f"cannot copy {path} from the runtime: {error}") from error


def _abi_of(folder: Path, runtime: Path, wanted: Abi | None) -> Abi:
    machines = {machine for path in folder.rglob("*") if path.is_file() and (machine := machine_of(path))}
    if not machines and wanted is not None:
        return wanted
    known: dict[str, Abi] = {platform.machine: abi for abi, platform in PLATFORMS.items()}
    found = [known.get(machine) for machine in machines]
    if len(found) == 1 and found[0] is not None and wanted in (None, found[0]):
        return found[0]
    sought = f"binaries for {wanted}" if wanted else f"binaries for one of {', '.join(PLATFORMS)}"
    what = ", ".join(sorted(known.get(m, m) for m in machines)) or "none (then say --abi)"
    raise BundleError(f"{runtime}: sought {sought}, found {what}")
