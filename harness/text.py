"""Prompts as text: a checkpoint's tokenizer.json and its chat template."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from harness import chat_render
from harness.errors import HarnessError
from kvengine.artifact import MANIFEST, Artifact

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_LARGEST_FILE = 256 << 20  # bytes; Gemma 3's tokenizer.json has 33 MB
_RENDER_SECONDS = 2.0 * chat_render.CPU_SECONDS
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")

Made = TypeVar("Made")


class TextError(HarnessError):
    """There is no tokenizer or chat template, it is unusable, or it does not fit the model."""


class Tokenizer:
    """What turns text into token ids and back: ``tokenizers``' own, from a checkpoint or an artifact."""

    def __init__(self, tokenizer: Path, settings: Path | None = None, template: Path | None = None) -> None:
        """Raises TextError: a file is missing, too large or not what it should be."""
        import tokenizers

        text = _read(tokenizer)
        self._tokenizer = _guarded(f"{tokenizer}", lambda: tokenizers.Tokenizer.from_str(text))
        self._settings = {} if settings is None else _json_object(settings)
        self._template = self._settings.get("chat_template") if template is None else _read(template)

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """That of a checkpoint or artifact folder; an artifact's files are checked against its manifest.

        Raises:
            TextError: it has none, or an unusable one.
            ArtifactError: the artifact is damaged.
        """
        names = (TOKENIZER, SETTINGS, TEMPLATE)
        if (folder / MANIFEST).is_file():
            artifact = Artifact.open(folder, verify=False)
            tokenizer, settings, template = map(artifact.extra, names)
        else:
            found = (folder / name for name in names)
            tokenizer, settings, template = (path if path.is_file() else None for path in found)
        if tokenizer is None:
            raise TextError(
                f"sought {TOKENIZER} in {folder}, found none; pass token ids, or the folder of a tokenizer"
            )
        return cls(tokenizer, settings, template)

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Token ids; ``special`` adds those that every prompt begins or ends with (such as BOS)."""
        return tuple(
            _guarded("the tokenizer", lambda: self._tokenizer.encode(text, add_special_tokens=special).ids)
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens; an id that the tokenizer does not know is ``<|id|>``."""
        parts: list[str] = []
        for known, group in itertools.groupby(tokens, key=self._knows):
            run = list(group)
            if known:
                parts.append(_guarded("the tokenizer", functools.partial(self._tokenizer.decode, run)))
            else:
                parts += [f"<|{token}|>" for token in run]
        return "".join(parts)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """``messages`` ({"role", "content"}) by the checkpoint's chat template, ready for an answer.

        The text has its special tokens already: encode it with ``special=False``.

        Raises:
            TextError: no template, or one that fails, needs too long or too much memory.
        """
        template = self._template
        if isinstance(template, list):  # several templates by name, as some checkpoints have it
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
            template = named.get("default")
        if not isinstance(template, str):
            raise TextError("this checkpoint has no chat template; pass the prompt as it should read")
        variables = {name: self._special(name) for name in _SPECIAL if self._special(name) is not None}
        return _rendered(template, list(map(dict, messages)), variables | {"add_generation_prompt": True})

    def check_fits(self, tokens: Sequence[int], vocab_size: int) -> None:
        """Raise TextError for a token that the model does not have: the tokenizer is of another model."""
        outside = [token for token in tokens if not 0 <= token < vocab_size]
        if outside:
            raise TextError(
                f"the tokenizer gives token {outside[0]}, the model has a vocabulary of {vocab_size}; "
                "tokenizer and checkpoint do not belong together"
            )

    def _knows(self, token: int) -> bool:
        return self._tokenizer.id_to_token(token) is not None

    def _special(self, name: str) -> str | None:
        value = self._settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        return content if isinstance(content, str) else None


def _rendered(template: str, messages: list[dict[str, str]], variables: dict[str, Any]) -> str:
    request = json.dumps({"template": template, "messages": messages, "variables": variables})
    command = [sys.executable, "-I", chat_render.__file__]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=_RENDER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise TextError(f"the chat template was not done within {_RENDER_SECONDS:g} s") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise TextError(
            f"the chat template ended its process ({done.returncode}): more than {chat_render.CPU_SECONDS} s "
            f"or {chat_render.MEMORY_BYTES >> 20} MiB"
        ) from None
    if "text" not in answer:
        raise TextError(f"the chat template failed: {answer.get('error')}")
    return str(answer["text"])


def _guarded(what: str, make: Callable[[], Made]) -> Made:
    """``make()``; what tokenizers raises (a bare Exception, or a panic of its Rust half) as TextError."""
    try:
        return make()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TextError(f"{what} is unusable: {str(error)[:300]}") from error
        raise


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise TextError(f"{path}: sought at most {_LARGEST_FILE:,} bytes, found more")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TextError(f"{path} is not readable: {error}") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TextError(f"{path}: sought a JSON object, found a {type(value).__name__}")
    return value
