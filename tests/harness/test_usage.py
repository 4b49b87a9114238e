"""What `pytest --devices=…` refuses, in one clear line and before anything is started or written."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--devices=host", "--recipes=hybird"), "hybird"),
        (("--devices=host", "--recipes=hybrid,provider=nnapi,flags=SUSTAINED_SPEED"), "SUSTAINED_SPEED"),
        (("--devices=host", "--model=nowhere"), "kvfarm synth"),
        (("--devices=host", "--measure=nowhere"), "DIR=RECIPES"),
        (("--devices=host", "--measure=tiny-gemma3=static@phone"), "static@phone"),
        (("--devices=farm", "--farm=choosy.toml"), "none of them is in"),
        (("--devices=host", "--tag=a b"), "sought a tag of at most"),
        (("--devices=host", "--depth=-1"), "--depth: sought"),
        (("--devices=host", "--sustained=-2"), "--sustained: sought"),
    ],
)
def test_bad_input_is_one_clear_line(
    pytester: pytest.Pytester, tiny_checkpoint: Path, arguments: tuple[str, ...], words: str
) -> None:
    pytester.path.joinpath("tiny-gemma3").symlink_to(tiny_checkpoint)
    pytester.path.joinpath("choosy.toml").write_text('[devices.one]\nrecipes = ["fp16"]\n')
    found = pytester.runpytest_inprocess("--model=tiny-gemma3", "--report=report", *arguments)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    output = found.stdout.str() + found.stderr.str()
    assert words in output
    assert "Traceback" not in output
    assert not (pytester.path / "report").exists()
