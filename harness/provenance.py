"""Where a run comes from: commits, versions, machine."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata

import kvengine

PACKAGES = ("onnxruntime", "numpy", "ray", "hypothesis", "transformers", "torch", "pytest")


def now() -> str:
    """This moment, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance() -> dict[str, str]:
    """Versions of everything that shaped the numbers, and the commit of the working directory."""
    found = {"kvfarm": kvengine.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["commit"] = commit()
    found["machine"] = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs"
    return found


def command_line(words: Iterable[str]) -> str:
    """A command as a shell takes it, without the passwords of URLs: reports show it."""
    return shlex.join(map(without_password, words))


def without_password(url: str) -> str:
    """``postgresql://user:***@host/database``; any other text as it is."""
    return re.sub(r"(://[^:/@\s]*:)[^\s]*@", r"\1***@", url)


def commit() -> str:
    """HEAD of the working directory, "+changes" where it is dirty, "" outside a git checkout."""
    head = _git("rev-parse", "HEAD")
    return head + ("+changes" if head and _git("status", "--porcelain") else "")


def commit_of_tag(tag: str) -> str:
    """The commit that git tag ``tag`` of the working directory names, "" if there is no such tag."""
    return _git("rev-parse", "--verify", "--quiet", f"refs/tags/{tag}^{{commit}}")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(("git", *arguments), capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
