"""The lab's token: a file for its owner alone; what cannot be used is refused with what to do."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from device_agents import scratch
from harness.errors import NotAuthenticated
from harness.hosting import token


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (token.MODE, token.TOKEN, token.PATH):
        monkeypatch.setenv(name, "x")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_a_new_token_is_long_and_its_owners_alone_and_stays() -> None:
    path = token.default_path()
    before = os.umask(0)
    try:
        assert token.create(path) is True
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    text = path.read_text()
    assert len(text) == 64
    assert token.create(path) is False
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (None, 0, r"sought the lab's token in .*No such file.*copy that file from the lab's head"),
        ("", 0o600, "sought one word"),
        ("two words", 0o600, "sought one word"),
        ("x" * 5000, 0o600, "sought one word"),
        ("\xff\xfe", 0o600, "sought one word"),
        ("hush", 0o644, r"others may read .*mode 0644.*chmod 600"),
        ("hush", 0o620, "others may read"),
    ],
)
def test_what_is_no_secret_is_refused_and_not_shown(
    text: str | None, mode: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
        path.chmod(mode)
    with pytest.raises(NotAuthenticated, match=said) as refused:
        token.show(path)
    assert not text or text not in str(refused.value)
    assert token.MODE not in os.environ


def test_the_variable_goes_before_the_file_and_disabled_means_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(token.MODE, "disabled")
    token.show(tmp_path / "missing")
    assert "says that we have none" in token.source()
    monkeypatch.delenv(token.MODE)
    monkeypatch.setenv(token.TOKEN, "secret")
    token.show(tmp_path / "missing")
    assert os.environ[token.MODE] == "token"
    assert token.source() == "that of RAY_AUTH_TOKEN"


def test_a_private_ray_has_a_token_of_its_own_and_leaves_no_trace(tmp_path: Path) -> None:
    outer, inner = tmp_path / f"{scratch.RAY}1-a", tmp_path / f"{scratch.RAY}1-b"
    outer.mkdir()
    inner.mkdir()
    with token.own(outer):
        assert os.environ[token.PATH] == str(outer / "token")
        with token.own(inner):  # of a process that was started while the other was there
            assert os.environ[token.PATH] == str(inner / "token")
        assert os.environ[token.PATH] == str(outer / "token")
    assert not {token.MODE, token.PATH} & os.environ.keys()


def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(token.MODE, "disabled")
    with token.own(tmp_path):
        assert os.environ[token.MODE] == "disabled"
    assert not (tmp_path / "token").exists()
