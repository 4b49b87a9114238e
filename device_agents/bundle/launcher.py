"""run.sh: what starts a bundle's Python on the device. POSIX shell, for it meets Android's mksh.

Sources of the settings: glibc ld.so(8), CPython "Command line and environment", and
experiments with onnxruntime 1.32 (ORT_DISABLE_TELEMETRY must be set before the import).
"""

from __future__ import annotations

from device_agents.bundle.lock import PLATFORMS, Abi

_HEAD = """\
#!/system/bin/sh
# Made by kvfarm. sh run.sh ARGUMENTS: Python with ARGUMENTS.
case $0 in */*) B=${0%/*} ;; *) B=. ;; esac
case $B in /*) ;; *) B=$PWD/$B ;; esac
export ORT_DISABLE_TELEMETRY=1
export PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1 PYTHONUTF8=1
"""

# KV_EMU: an emulator to start through, unset on a phone. --inhibit-cache: no library from
# the device's own /etc/ld.so.cache. -S: no site module, which would look outside the bundle.
# One BLAS thread: numpy's pool of one thread a core would only cost memory; the engine uses
# onnxruntime's.
_OURS = """\
unset LD_LIBRARY_PATH LD_PRELOAD PYTHONSTARTUP
export PYTHONHOME="$B" PYTHONPATH="$B/code:$B/site" LC_ALL=C.UTF-8
export HOME="${{KV_HOME:-$B}}"
export TMPDIR="${{TMPDIR:-$HOME}}" OPENBLAS_NUM_THREADS="${{OPENBLAS_NUM_THREADS:-1}}"
exec $KV_EMU "$B/lib/{loader}" --inhibit-cache --library-path "$B/lib" \\
  --argv0 "$B/bin/python3" "$B/bin/python3" -S "$@"
"""

_THEIRS = """\
export PYTHONPATH="$B/code${PYTHONPATH:+:$PYTHONPATH}"
exec sh "$B/runtime/run.sh" "$@"
"""


def run_sh(abi: Abi) -> str:
    """Of our own runtime: through the bundle's loader, with nothing from outside."""
    return _HEAD + _OURS.format(loader=PLATFORMS[abi].loader)


def runtime_run_sh() -> str:
    """Of a user's runtime: our modules on PYTHONPATH, then their run.sh."""
    return _HEAD + _THEIRS
