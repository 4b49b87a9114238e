"""The arrow between the rooms never turns back (design, "The rooms").

Imports are read from the source, also those inside functions, so nothing has to be installed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kvengine", "device_agents", "harness", "reports")
OUR_NAMES = {*ROOMS, "tests", "bench"}

# What each room may import besides itself and the standard library.
RUNTIME = {"numpy", "onnxruntime"}  # all that a phone has
BUILD = {"onnx", "onnx_ir", "safetensors", "ml_dtypes"}
ALLOWED: dict[str, set[str]] = {
    "kvengine": RUNTIME,
    "kvengine/export": RUNTIME | BUILD,
    # numpy and onnxruntime come with kvengine and are wherever a runner is.
    "device_agents": {"kvengine", "adbutils"} | RUNTIME,
}
# Any third party, but of ours only these.
OURS: dict[str, set[str]] = {"reports": set(), "harness": {"kvengine", "device_agents", "reports"}}
# What runs on the phone, next to kvengine: nothing that only a lab host has.
ON_THE_PHONE = ("runner", "frames", "messages", "vitals", "probe", "deadline", "errors", "api", "__init__")


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2]) if "/".join(parts[:2]) in ALLOWED else parts[0]


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Full names of the modules that ``source``, a module in ``package``, imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # ``from kvengine import export`` imports kvengine.export.
            yield from [module] if "." in module else (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def trespasses(room: str, modules: Iterator[str]) -> list[str]:
    """Those of ``modules`` that ``room`` may not import."""
    own = room.split("/")[0]
    found = []
    for module in modules:
        top = module.split(".")[0]
        if room in OURS:
            allowed = top == own or top not in OUR_NAMES or top in OURS[room]
        elif room == "kvengine" and module.startswith("kvengine.export"):
            allowed = False  # the runtime half knows nothing of the build half
        else:
            allowed = top == own or top in sys.stdlib_module_names or top in ALLOWED[room]
        if not allowed:
            found.append(module)
    return found


def test_there_is_something_to_check() -> None:
    checked = {room_of(path) for path in sources()}
    assert checked == {*ALLOWED, *OURS}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[:-1]
    found = trespasses(room_of(path), imports(path.read_text(), package))
    assert not found, f"{path.relative_to(ROOT)} may not import {found}"


@pytest.mark.parametrize("name", ON_THE_PHONE)
def test_what_runs_on_the_phone_needs_only_itself_and_the_engine(name: str) -> None:
    allowed = {f"device_agents.{module}" for module in ON_THE_PHONE} | {"device_agents"}
    for module in imports((ROOT / "device_agents" / f"{name}.py").read_text(), ("device_agents",)):
        top = module.split(".")[0]
        assert module in allowed or top == "kvengine" or top in RUNTIME or top in sys.stdlib_module_names, (
            module
        )


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("kvengine", "import os, numpy, onnxruntime.capi", []),
        ("kvengine", "import onnx", ["onnx"]),
        ("kvengine", "from kvengine.export import build", ["kvengine.export"]),
        ("kvengine", "from kvengine import export", ["kvengine.export"]),
        ("kvengine", "def f():\n    from device_agents import api", ["device_agents.api"]),
        ("kvengine", "import importlib\nimportlib.import_module('torch')", ["torch"]),
        ("kvengine", "from .export.build import x", ["kvengine.export.build"]),
        ("kvengine/export", "import onnx, safetensors.numpy, ml_dtypes, kvengine.plan", []),
        ("kvengine/export", "import torch", ["torch"]),
        ("device_agents", "import kvengine.codec, adbutils", []),
        ("device_agents", "import harness.farm", ["harness.farm"]),
        ("device_agents", "import ray", ["ray"]),
        ("reports", "import kvengine.plan", ["kvengine.plan"]),
        ("reports", "import jinja2, altair, reports.results", []),
        ("harness", "import torch, kvengine, device_agents, reports", []),
        ("harness", "from tests import x", ["tests.x"]),
    ],
)
def test_the_check_sees_what_it_should(room: str, source: str, expected: list[str]) -> None:
    assert trespasses(room, imports(source, (room.split("/")[0],))) == expected
