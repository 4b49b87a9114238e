"""What goes into a bundle and what is left out: packages, our modules, and rules over file names."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path

import kvengine

DEBS = (
    "libc6",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libstdc++6",
    "python3.11-minimal",
    "zlib1g",
)
# Enough of the lab host's own architecture to compile .py to .pyc, the same everywhere.
COMPILER_DEBS = (
    "libc6",
    "libexpat1",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "python3.11-minimal",
    "zlib1g",
)
WHEELS = ("numpy", "onnxruntime")

LIBRARIES = (
    *(
        "libc.so.6",
        "libm.so.6",
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
        "libutil.so.1",
        "libresolv.so.2",
    ),
    *("libnss_files.so.2", "libgcc_s.so.1", "libstdc++.so.6", "libz.so.1", "libexpat.so.1", "libffi.so.8"),
)

# Of device_agents; the same list as ON_THE_PHONE in tests/test_rooms.py, which keeps them self-contained.
ON_DEVICE = ("__init__", "api", "deadline", "errors", "frames", "messages", "probe", "runner", "vitals")

# Patterns of fnmatch: "*" also matches "/".
_STDLIB_OUT = (
    *("test/*", "idlelib/*", "tkinter/*", "turtledemo/*", "turtle.py", "ensurepip/*", "lib2to3/*"),
    *("distutils/*", "pydoc_data/*", "unittest/test/*", "config-3.11-*", "xmlrpc/*", "sqlite3/*"),
    *("curses/*", "venv/*", "dbm/*", "wsgiref/*", "__phello__/*", "lib-dynload/*"),
)
# OpenSSL, sqlite, ncurses, bz2, lzma would each bring libraries; the rest is for tests and for CJK text.
_DYNLOAD_OUT = (
    *("_ssl", "_hashlib", "_sqlite3", "_curses*", "_dbm", "_gdbm", "readline", "nis", "ossaudiodev"),
    *("_test*", "_xx*", "xx*", "_ctypes_test", "_codecs_jp", "_codecs_hk", "_codecs_cn", "_codecs_kr"),
    *("_codecs_tw", "_codecs_iso2022", "audioop", "_crypt", "_uuid", "_tkinter", "_lsprof", "_bz2", "_lzma"),
)
# capi/libonnxruntime.so (27 MB) is for C programs: the Python binding has all of it inside.
_SITE_OUT = (
    *("onnxruntime/transformers/*", "onnxruntime/tools/*", "onnxruntime/quantization/*"),
    *("onnxruntime/datasets/*", "onnxruntime/backend/*", "onnxruntime/capi/libonnxruntime.so*"),
    *("onnxruntime/ThirdPartyNotices.txt", "onnxruntime/Privacy.md"),
    *("numpy/f2py/*", "numpy/distutils/*", "numpy/_pyinstaller/*", "numpy/doc/*", "numpy/_core/include/*"),
    *("numpy/_core/lib/*", "numpy/random/lib/*", "numpy/_core/*tests*.so", "*/tests/*"),
    *("*.pyi", "*.pxd", "*.pyx", "*.a", "*.h", "*.dist-info/RECORD", "*.dist-info/WHEEL"),
    *("*.dist-info/entry_points.txt", "*.dist-info/top_level.txt", "*/py.typed"),
)


def keeps_stdlib(name: str) -> bool:
    """Whether the module file ``name``, relative to /usr/lib/python3.11, goes into the bundle."""
    return name.endswith(".py") and not _matches(name, _STDLIB_OUT)


def keeps_dynload(name: str) -> bool:
    """Whether the extension module ``name`` of lib-dynload goes into the bundle."""
    return name.endswith(".so") and not _matches(name.split(".")[0], _DYNLOAD_OUT)


def keeps_site(name: str) -> bool:
    """Whether the file ``name`` of a wheel goes into the bundle."""
    return not _matches(name, _SITE_OUT) and "__pycache__" not in name


def own_sources() -> dict[str, Path]:
    """Our modules that run on the device: name in the bundle's code folder to source file."""
    engine = Path(kvengine.__file__).parent
    agents = Path(__file__).parents[1]
    found = {f"kvengine/{path.name}": path for path in sorted(engine.glob("*.py"))}
    return found | {f"device_agents/{name}.py": agents / f"{name}.py" for name in ON_DEVICE}


def digest_of(sources: dict[str, Path]) -> str:
    """sha256 over names and contents."""
    digest = hashlib.sha256()
    for name, path in sorted(sources.items()):
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
