"""Renders one chat template, in a process of its own: a checkpoint's template is somebody else's program.

Reads a JSON object {"template", "messages", "variables"} from stdin, writes {"text"} or {"error"} to stdout.
The sandbox keeps the template from Python's internals, the limits keep it from the machine's time and
memory. Run as a plain script, so that nothing of ours is imported.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

CPU_SECONDS = 5
MEMORY_BYTES = 512 << 20
MOST_TEXT = 4 << 20  # characters


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    request = json.load(sys.stdin)
    try:
        text = render(request["template"], request["messages"], request["variables"])
        if len(text) > MOST_TEXT:
            raise ValueError(f"the text has {len(text):,} characters, at most {MOST_TEXT:,} are taken")
        answer = {"text": text}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        answer = {"error": "it recurses without end"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    json.dump(answer, sys.stdout)


def render(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """As transformers' ``apply_chat_template`` (utils/chat_template_utils.py): same sandbox, same helpers."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        """Without underscored attributes, by which a template could reach Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, rest = args[0], args[1:]
            values = dict(*rest, **kwargs)
            for name in values:
                _check_plain(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_plain(name)
            Namespace.__setitem__(self, name, value)

    def _check_plain(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"no underscored attribute such as {name!r} on a namespace")

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    class GenerationTag(jinja2.ext.Extension):
        """``{% generation %}`` marks what an assistant said; here its body is just text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda style: datetime.now().strftime(style),
        "namespace": PlainNamespace,
    }
    return environment.from_string(template).render(messages=messages, **variables)


if __name__ == "__main__":
    main()
