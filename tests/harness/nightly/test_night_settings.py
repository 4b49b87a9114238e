"""nightly.toml: the examples in the docs load, and what is wrong is told with file, key, sought and found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.gate import settings as gate_settings
from harness.nightly import drill
from harness.nightly.errors import NightError
from harness.nightly.settings import NightSettings, load

DOCS = Path(__file__).parents[3] / "docs"
NEEDED = 'model = "m"\nbaseline = "static"\ncandidate = "hybrid"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "nightly.toml"
    path.write_text(text)
    return path


def example(number: int) -> str:
    found: list[str] = re.findall(r"```toml\n(.*?)```", (DOCS / "nightly.md").read_text(), re.DOTALL)
    return found[number]


def test_the_example_in_the_docs_loads_and_states_the_defaults(tmp_path: Path) -> None:
    shown = load(written(tmp_path, example(0)))
    plain = load(written(tmp_path, NEEDED))
    assert shown.parts == plain.parts
    assert shown.calibrate == plain.calibrate
    assert (shown.check.examples, shown.measure.repeats) == (plain.check.examples, plain.measure.repeats)
    assert shown.measure.prompts == plain.measure.prompts
    assert shown.report == plain.report
    with_drill = load(written(tmp_path, NEEDED + example(1)))
    assert with_drill.drill is not None
    assert "window one too wide" in drill.told(with_drill.drill)


@pytest.mark.parametrize("name", ["aa", "slowdown", "mutant"])
def test_the_drills_in_the_docs_load(name: str) -> None:
    settings = load(DOCS / "nightly" / f"{name}.toml")
    drill.check(settings)
    assert (settings.drill is None) == (name == "aa")
    assert settings.gate.settings == "docs/nightly/gate.toml"
    gate_settings.load(DOCS.parent / settings.gate.settings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "needs 'model'"),
        (NEEDED + 'modle = "m"', "unknown key 'modle'"),
        (NEEDED + "[gate]\nblock = 8", "nightly.toml.gate: unknown key 'block'"),
        (NEEDED + "devices = 3", "nightly.toml.devices: sought str, found int"),
        (NEEDED + 'parts = ["gate", "check"]', "parts: sought some of calibrate, check, measure, gate"),
        (NEEDED + 'parts = ["party"]', "parts[0]: sought one of"),
        (NEEDED + "parts = []", "parts: sought some of"),
        (NEEDED + "[calibrate]\nshare = 1.0", "calibrate.share: sought a share from 0 up and below 1"),
        (NEEDED + "[calibrate]\nshare = 10", "found 10.0"),
        (NEEDED + "[check]\nexamples = 0", "check.examples: sought at least 1, found 0"),
        (NEEDED + "[measure]\nprompts = []", "measure.prompts: sought numbers of tokens from 1 up"),
        (NEEDED + "[measure]\nnew_tokens = [1]", "measure.new_tokens: sought numbers of tokens from 2 up"),
        (NEEDED + "[drill]", "drill: sought slowdown, memory or mutant"),
        (NEEDED + "[drill]\nslowdown = -0.1", "drill.slowdown: sought a share from 0 to 10"),
        (NEEDED + 'tag = "v1"\n[drill]\nslowdown = 0.1', "a drill's candidate is no release"),
        (NEEDED + "model = again", "nightly.toml is no nightly.toml"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(NightError) as error:
        load(written(tmp_path, text))
    assert told in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_missing_file_says_where_an_example_is(tmp_path: Path) -> None:
    with pytest.raises(NightError, match=r"none\.toml.*docs/nightly\.md"):
        load(tmp_path / "none.toml")


def settings(candidate: str, mutant: str) -> NightSettings:
    from harness.nightly.settings import DrillSettings

    return NightSettings("m", "static", candidate, drill=DrillSettings(mutant=mutant))


def test_a_mutant_that_does_not_reach_the_device_is_refused_with_those_that_do() -> None:
    """It would alter the engine of this process, which is not the one on the device."""
    with pytest.raises(
        NightError, match=r"found 'length by non-zero keys'; there are .*'window one too wide'"
    ):
        drill.check(settings("hybrid", "length by non-zero keys"))


def test_a_mutant_needs_a_candidate_that_is_exported_anew() -> None:
    with pytest.raises(NightError, match=r"sought a recipe, found 'v1\.2'"):
        drill.check(settings("v1.2", "window one too wide"))
