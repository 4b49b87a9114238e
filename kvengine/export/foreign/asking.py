"""What an inference has to go on, and what it has to ask."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvengine.contract import Layout, Role
from kvengine.errors import RecipeError, UnsupportedModel
from kvengine.export.foreign.genai import GenaiConfig
from kvengine.export.foreign.wiring import Value, Wiring

OPTIONS = {
    "past.layout": "axes of the cache: bnsh, bsnh or bnhs (batch, KV heads, sequence, head_dim)",
    "past.kind": "growing or static",
    "past.heads": "KV heads",
    "past.head_dim": "elements of one head",
    "past.rows": "rows of a static cache whose writer is not known",
    "past.window": "tokens a query sees, itself included",
    "logits": "name of the output with the logits",
    "input.NAME": f"what input NAME is: {', '.join(typing.get_args(Role))}",
    "pair.NAME": "name of the output that carries the cache input NAME on",
}


@dataclass
class Asking:
    """A model under inspection. questions: option to why it is needed; filled as the inference goes."""

    path: Path
    wiring: Wiring
    genai: GenaiConfig
    answers: Mapping[str, str]
    questions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ask(self, key: str, why: str) -> None:
        self.questions.setdefault(key, why)

    def number(self, key: str, why: str) -> int | None:
        """The answer to ``key``, or None and it is asked for."""
        if key in self.answers:
            return int(self.answers[key])
        self.ask(key, why)
        return None

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def unsupported(self, text: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.path}: {text}")


def check_answers(answers: Mapping[str, str], wiring: Wiring) -> None:
    """Raises RecipeError for an answer to what nobody asks, or of no meaning."""
    choices: dict[str, tuple[str, ...]] = {
        "past.layout": typing.get_args(Layout),
        "past.kind": ("growing", "static"),
        "logits": tuple(wiring.outputs),
    }
    for key, value in answers.items():
        group, _, name = key.partition(".")
        if group in ("input", "pair") and name:
            if name not in wiring.inputs:
                raise RecipeError(
                    f"--set {key}: the model has no input {name!r}; it has {listed(wiring.inputs.values())}"
                )
            allowed = typing.get_args(Role) if group == "input" else tuple(wiring.outputs)
        elif key in OPTIONS and key not in choices:
            if not (value.isascii() and value.isdigit() and 0 < int(value) < 1 << 24):
                raise RecipeError(f"--set {key}={value}: sought a whole number of at least 1")
            continue
        elif key in choices:
            allowed = choices[key]
        else:
            raise RecipeError(f"--set {key}: unknown; there are {', '.join(OPTIONS)}")
        if value not in allowed:
            raise RecipeError(f"--set {key}={value}: sought one of {', '.join(allowed)}")


def listed(values: Iterable[Value]) -> str:
    return ", ".join(value.name for value in values)
