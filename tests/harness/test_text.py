"""Prompts as text: the checkpoint's own tokenizer, and its chat template kept in a sandbox."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import chat_render, text
from harness.synth import synth
from harness.text import TextError, Tokenizer
from kvengine.errors import ArtifactError
from kvengine.export import export
from kvengine.recipe import ExportRecipe
from tests.conftest import ExportTiny

TEXTS = ["the other hair", "Grüße, 世界 🐈\n\ttab", "", "<bos> is a word here?", "[bold]x[/bold]"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.open(tiny_checkpoint)


@pytest.fixture
def with_template(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[object], Tokenizer]:
    """The tiny checkpoint's tokenizer with another chat template."""

    def make(template: object) -> Tokenizer:
        folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "t"))
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return Tokenizer.open(folder)

    return make


@pytest.mark.parametrize("prompt", TEXTS)
def test_token_ids_are_those_of_transformers_and_come_back_as_the_text(
    prompt: str, tokenizer: Tokenizer, tiny_checkpoint: Path
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = tokenizer.encode(prompt)
    assert list(ids) == theirs(prompt)["input_ids"]
    assert ids[0] == 2
    assert tokenizer.encode(prompt, special=False) == ids[1:]
    assert tokenizer.decode(ids) == prompt.replace("<bos>", "")


def test_a_chat_is_rendered_as_transformers_does(tokenizer: Tokenizer, tiny_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.chat(CHAT) == theirs == "<bos><system>Be brief.\n<user>Hi\n<assistant>"


HELPERS = """{%- set ns = namespace(n=0) -%}
    {%- for m in messages %}
        {%- if loop.index > 9 %}{% break %}{% endif %}
        {%- set ns.n = ns.n + m.content | length %}
    {%- endfor %}
{% generation %}{{ messages[0] | tojson }} {{ ns.n }}{% endgeneration %} {{ strftime_now('%Y') | length }}"""


def test_the_helpers_that_published_templates_use_are_there(
    with_template: Callable[[object], Tokenizer], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    ours = with_template(HELPERS)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert ours.chat(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert "13 4" in ours.chat(CHAT)


def test_a_template_file_wins_and_named_templates_have_a_default(
    tmp_path: Path, with_template: Callable[[object], Tokenizer]
) -> None:
    named = with_template([{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}])
    assert named.chat(CHAT) == "yes"
    (tmp_path / "t" / "chat_template.jinja").write_text("file {{ messages[1].content }}")
    assert Tokenizer.open(tmp_path / "t").chat(CHAT) == "file  Hi "


HOSTILE = {
    "code": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError|unsafe"),
    "change of the messages": ("{{ messages.append(1) }}", "SecurityError|unsafe"),
    "a namespace with dunders": ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
    "import": ("{% import 'os' as os %}", "failed"),
    "syntax": ("{% for", "TemplateSyntaxError"),
    "its own refusal": ("{{ raise_exception('not this role') }}", "not this role"),
    "recursion": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "recurses|ended its process",
    ),
    "memory": ("{{ 'a' * 10**10 }}", "memory"),
    "a long text": ("{{ 'ab' * 3000000 }}", "characters"),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError|[Rr]ange"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(name: str, with_template: Callable[[object], Tokenizer]) -> None:
    template, said = HOSTILE[name]
    with pytest.raises(TextError, match=said):
        with_template(template).chat(CHAT)


def test_a_format_string_reaches_no_attribute(with_template: Callable[[object], Tokenizer]) -> None:
    assert with_template("<{{ '{0.__class__}'.format(messages) }}>").chat(CHAT) == "<>"


def test_a_template_without_end_is_ended(
    with_template: Callable[[object], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_RENDER_SECONDS", 1.0)  # the CPU limit of 5 s would end it too
    inner = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    started = time.monotonic()
    with pytest.raises(TextError, match="not done within 1 s"):
        with_template(inner).chat(CHAT)
    assert time.monotonic() - started < 30


def test_the_process_that_renders_limits_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a parent that waits: an endless template is ended by the kernel."""
    import resource

    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "setrlimit", lambda kind, value: limits.update({kind: value}))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(ValueError, match="Expecting value"):
        chat_render.main()
    assert limits[resource.RLIMIT_CPU] == (5, 5)
    assert limits[resource.RLIMIT_AS] == (512 << 20,) * 2
    assert limits[resource.RLIMIT_FSIZE] == (0, 0)


def test_an_artifact_carries_its_tokenizer(export_tiny: ExportTiny, tokenizer: Tokenizer) -> None:
    folder = export_tiny(ExportRecipe()).folder
    assert Tokenizer.open(folder).encode("hi there") == tokenizer.encode("hi there")


def test_an_altered_tokenizer_of_an_artifact_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = export(tiny_checkpoint, tmp_path / "a", ExportRecipe()).folder
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<bos>", "<b0s>"))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json was altered"):
        Tokenizer.open(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match="found none"):
        Tokenizer.open(folder)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"sought tokenizer\.json"):
        Tokenizer.open(tmp_path)
    for content in ("", "{}", "[" * 100_000, '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(TextError, match="unusable"):
            Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(TextError, match="not readable"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000])
def test_settings_that_are_no_object_are_refused(tiny_checkpoint: Path, tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "t"))
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(TextError, match="JSON"):
        Tokenizer.open(folder)


def test_no_template_is_said(with_template: Callable[[object], Tokenizer]) -> None:
    with pytest.raises(TextError, match="no chat template"):
        with_template(None).chat(CHAT)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer.check_fits((0, 330), 331)
    with pytest.raises(TextError, match=r"token 331.*vocabulary of 331"):
        tokenizer.check_fits((5, 331), 331)


def test_an_id_beyond_the_tokenizer_is_shown_as_a_number(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode((*tokenizer.encode("hi"), 5000, 5001)) == "hi<|5000|><|5001|>"


def test_every_preset_has_a_tokenizer_within_its_vocabulary(tmp_path: Path) -> None:
    folder = synth("tiny-smollm3", tmp_path / "m")
    ids = Tokenizer.open(folder).encode("".join(map(chr, range(32, 1000))))
    assert max(ids) < 331
