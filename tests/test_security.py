"""What docs/security.md promises of the code as a whole: read from the source, so that nothing slips in."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.api import DeviceIdentity
from device_agents.lab_types import DeviceStatus, Lease
from harness.cli import watching
from harness.cli.devices import _identity_cells
from harness.cli.output import Console, note, show
from tests.test_rooms import ROOT, imports, sources

# Their readers run what they are given.
EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "jsonpickle"}
# Scripts are what ends in a device's shell: by these names in device_agents.
SHELLS = {"shell", "checked", "_shell", "_open_shell"}
HOSTILE = "\x1b]0;owned\x07\x1b[2J[red]\x9b31m\u202egnp"


# -- nothing that is received is ever run -------------------------------------------------------------


def executing(source: str) -> list[str]:
    found = [name for name in imports(source, ()) if name.split(".")[0] in EXECUTES]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "compile", "__import__"):
            found.append(called)
        if called.endswith("np.load") and options.get("allow_pickle") != "False":
            found.append("np.load without allow_pickle=False")
        if called == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated_outside_rays_cluster(path: Path) -> None:
    assert executing(path.read_text()) == []


def test_the_check_sees_what_executes() -> None:
    for source in (
        "import pickle",
        "def f():\n    from yaml import load",
        "eval(x)",
        "np.load(f)",
        "torch.load(f)",
    ):
        assert executing(source), source
    assert executing("np.load(f, allow_pickle=False); re.compile(x); model.eval()") == []


# -- shell arguments are quoted, never put together ---------------------------------------------------


def unquoted(source: str) -> list[str]:
    """Shells of this machine, and whatever a device's shell gets that nobody has quoted."""
    tree = ast.parse(source)
    known = set(_quoted_names(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"):
                found.append(called)
            found += [f"{called}(shell=...)" for keyword in node.keywords if keyword.arg == "shell"]
    functions: list[ast.AST] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for within in functions or [tree]:
        made: dict[str, list[ast.expr]] = {}  # scripts by the name they have before they are run
        for node in ast.walk(within):
            if isinstance(node, ast.Assign):
                made.setdefault(ast.unparse(node.targets[0]), []).append(node.value)
        for node in ast.walk(within):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                continue
            if node.func.attr in SHELLS:
                scripts = made.get(ast.unparse(node.args[0]), [node.args[0]])
                parts = (part for script in scripts for part in _inserted(script))
                found += [f"{node.func.attr}: {part}" for part in parts if part not in known]
    return found


def _inserted(script: ast.expr) -> Iterator[str]:
    """What is put into a script, unless it is quoted on the spot."""
    parts: list[ast.expr] = []
    if isinstance(script, ast.JoinedStr):
        parts = [part.value for part in script.values if isinstance(part, ast.FormattedValue)]
    elif isinstance(script, ast.Call) and ast.unparse(script.func).endswith(".format"):
        parts = [*script.args, *(keyword.value for keyword in script.keywords)]
    elif isinstance(script, ast.BinOp):
        parts = [script.left, script.right]
    for part in parts:
        if not (isinstance(part, ast.Constant) or _quotes(part)):
            yield ast.unparse(part)


def _quotes(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) in ("shlex.quote", "shlex.join", "int")


def _quoted_names(tree: ast.Module) -> Iterator[str]:
    """What was quoted before; whole numbers, which need not be; constants of the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _is_safe(node.value):
            yield from (ast.unparse(target) for target in node.targets)
        if (
            isinstance(node, ast.arg)
            and node.annotation is not None
            and ast.unparse(node.annotation) == "int"
        ):
            yield node.arg
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(each, ast.Return) and each.value is not None and _quotes(each.value)
            for each in node.body
        ):
            yield from (node.name, f"self.{node.name}")
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from (ast.unparse(target) for target in node.targets)


def _is_safe(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return _is_safe(value.body) and _is_safe(value.orelse)
    return isinstance(value, ast.Constant) or _quotes(value)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_gets_what_nobody_quoted(path: Path) -> None:
    assert unquoted(path.read_text()) == []


def test_the_check_sees_what_is_put_together() -> None:
    for source in (
        "import subprocess\nsubprocess.run(x, shell=True)",
        "import os\nos.system('ls ' + x)",
        "t.checked(f'rm {path}', d)",
        "t.shell('rm ' + path, d)",
        "t.shell(_RM.format(folder=path), d)",
        "script = f'rm {path}'\nt.shell(script, d)",
    ):
        assert unquoted(source), source
    for source in (
        "t.checked(f'rm {shlex.quote(path)}', d)",
        "path = shlex.quote(x)\nt.checked(f'rm {path}', d)",
        "def kill(pid: int):\n    t.shell(f'kill {pid}', d)",
        "t.shell('true', d)",
    ):
        assert unquoted(source) == [], source


# -- nothing that a device says commands the terminal -------------------------------------------------


def commands(text: str) -> list[str]:
    """Whatever in it is for a terminal and not for people."""
    return re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_tables_of_devices_show_escape_sequences_as_text() -> None:
    lease = Lease(HOSTILE, HOSTILE, 1, user=HOSTILE)
    identity = DeviceIdentity(
        HOSTILE, "android", HOSTILE, HOSTILE, "x", HOSTILE, "", 1, 1 << 30, (), {}, HOSTILE
    )
    statuses = (
        DeviceStatus(HOSTILE, "android", identity, "", lease),
        DeviceStatus(HOSTILE, "android", None, HOSTILE),
        DeviceStatus(HOSTILE, "android", identity, "", None, HOSTILE),
    )
    out = io.StringIO()
    Console(file=out, width=300, force_terminal=False).print(watching.table(statuses))
    assert commands(out.getvalue()) == []
    assert "\\x1b]0;owned\\x07\\x1b[2J[red]" in out.getvalue()  # nor is it markup of ours
    out = io.StringIO()
    Console(file=out, width=300).print(" ".join(_identity_cells(statuses[0])), markup=False)
    assert commands(out.getvalue()) == []


def test_results_and_notes_show_escape_sequences_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    plain = HOSTILE.replace("[red]", "")
    show(False, {}, f"pixel answers {plain}")
    note(f"pixel answers {HOSTILE}")
    show(True, {"said": HOSTILE}, "")
    said = capsys.readouterr()
    assert commands(said.out) == []
    assert commands(said.err) == []
    assert "[red]" in said.err
