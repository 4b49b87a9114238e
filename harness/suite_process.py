"""The suite in a pytest of its own, as a command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

SUITE = "harness.suite"


def suite_command(arguments: Sequence[str], modules: Sequence[str] = (SUITE,)) -> list[str]:
    """``-c`` an empty file: the suite is ours, so whatever configuration lies about must not change it."""
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={Path.cwd()}"]
    return [*command, "-p", "no:cacheprovider", "--pyargs", *modules, *arguments]
