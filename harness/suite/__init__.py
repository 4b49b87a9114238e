"""The built-in correctness suite, and its checks as functions for whoever runs them without pytest."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any


def checks() -> list[Callable[[Any], None]]:
    """Every check that takes a harness.checking.Cell, as they stand in the files."""
    modules = [
        importlib.import_module(f"{__name__}.{each.name}")
        for each in pkgutil.iter_modules(__path__)
        if each.name.startswith("test_")
    ]
    return [
        member
        for module in modules
        for name, member in vars(module).items()
        if name.startswith("test_") and _is_check(member)
    ]


def title_of(check: Callable[..., None]) -> str:
    """The property in words: the first line of the docstring."""
    text = inspect.getdoc(check) or check.__name__.removeprefix("test_").replace("_", " ")
    return text.splitlines()[0]


def _is_check(member: object) -> bool:
    return inspect.isfunction(member) and "cell" in inspect.signature(member).parameters
