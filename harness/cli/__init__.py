"""The ``kvfarm`` command: one app, its commands in the modules beside this one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import kvengine
from device_agents import logs
from harness.cli import (
    ablate,
    audit,
    bundle,
    comparing,
    dash,
    devices,
    doctor,
    gate,
    generate,
    history,
    hosts,
    inspecting,
    leases,
    models,
    mutants,
    nightly,
    phones,
    replaying,
    runs,
    timeline,
    wireless,
)
from harness.cli.output import EXPECTED, REFUSED, fail

app = typer.Typer(
    name="kvfarm",
    help="Is the KV cache of an on-device LLM still right, and no slower, on every device you support?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (
    models,
    inspecting,
    generate,
    bundle,
    doctor,
    devices,
    replaying,
    leases,
    audit,
    dash,
    timeline,
    hosts,
    wireless,
    phones,
    runs,
    comparing,
    history,
    gate,
    nightly,
    ablate,
    mutants,
):
    module.register(app)

# Typer carries click inside from some version on; either way this is what a wrong option raises.
_UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvfarm {kvengine.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print kvfarm's version and exit."
    ),
    log_file: Annotated[
        Path | None,
        typer.Option(help="Append what happens to this file, a JSON object a line; also of what it starts."),
    ] = None,
) -> None:
    logs.set_up(log_file)


def run(arguments: Sequence[str]) -> int:
    """One command line; returns the exit code: 0 done, 1 something was wrong, 2 refused, 130 interrupted.

    What the engine, the lab or the harness refuses is one line on stderr (with ``--json`` also
    ``{"error": {"type", "message"}}`` on stdout), never a traceback.
    """
    ours = arguments[: list(arguments).index("--")] if "--" in arguments else arguments
    as_json = "--json" in ours
    try:
        result = app(args=list(arguments), prog_name="kvfarm", standalone_mode=False)
    except _UsageError as error:
        return _usage(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        fail("Interrupted", "interrupted", as_json)
        return 130
    except ModuleNotFoundError as error:
        missing = f"this command needs the package {error.name}; pip install 'kvfarm[all]'"
        return fail(type(error).__name__, missing, as_json)
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return fail(type(error).__name__, named, as_json)
    except EXPECTED as error:
        return fail(type(error).__name__, str(error), as_json)
    return result if isinstance(result, int) else 0


def _usage(error: Exception, as_json: bool) -> int:
    message = getattr(error, "format_message", error.__str__)()
    if type(error).__name__ == "NoArgsIsHelpError":  # whose message is the help itself
        typer.echo(message, err=True)
        return REFUSED
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "kvfarm"
    return fail("UsageError", f"{message.rstrip('.')}; see {command} --help", as_json)


def main() -> None:
    """Entry point of the ``kvfarm`` script."""
    sys.exit(run(sys.argv[1:]))
