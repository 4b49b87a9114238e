"""A night made of made-up parts: order, verdict, history, and that a kill costs nothing."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from device_agents.errors import InfrastructureError
from harness.choosing import Selection
from harness.gate.references import Resolved
from harness.gate.session import Watcher
from harness.gate.settings import GateSettings
from harness.nightly import discover
from harness.nightly.discover import Discovered
from harness.nightly.errors import NightError
from harness.nightly.gate import headline_of, word_of
from harness.nightly.night import NightSession, Prepared, _alone
from harness.nightly.parts import Found, Night, Part
from harness.nightly.settings import NightSettings
from harness.store import open_store
from kvengine.codec import decode
from kvengine.recipe import ExportRecipe, SessionRecipe
from reports.gate_night import NightDevice, NightInfo, NightWord
from reports.gate_results import GateVerdict, Side
from tests.conftest import ExportTiny
from tests.reports.gate_sample import exact_cell, gate_cell, sample_gate


class Killed(BaseException):
    """As sudden as a SIGKILL, for this process."""


@dataclass
class MadeUp:
    """A part that says ``word``."""

    name: str
    log: list[str]
    word: NightWord = "PASS"
    decides: bool = True
    error: BaseException | None = None

    @property
    def title(self) -> str:
        return self.name.capitalize()

    def run(self, night: Night, folder: Path) -> Found:
        assert folder.is_dir()
        self.log.append(self.name)
        if self.error is not None:
            raise self.error
        (folder / "index.html").write_text(self.name)
        return Found(self.word, f"{self.title} says {self.word}", f"What {self.name} found.")


@dataclass
class Nights:
    """Runs nights of four parts in one folder."""

    folder: Path
    side: Resolved
    log: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: NightSettings = field(
        default_factory=lambda: NightSettings("m", "static", "hybrid", devices="host", report="out")
    )

    def run(
        self,
        words: dict[str, NightWord] | None = None,
        errors: dict[str, BaseException] | None = None,
        settings: NightSettings | None = None,
    ) -> NightInfo:
        words, errors = words or {}, errors or {}
        parts: list[Part] = []
        for name in ("calibrate", "check", "measure", "gate"):
            word = words.get(name, "PASS")
            parts.append(MadeUp(name, self.log, word, name != "calibrate", errors.get(name)))
        chosen = settings or self.settings
        prepared = Prepared(
            chosen, Path("nightly.toml"), GateSettings(), "defaults", (), self.side, self.side
        )
        watcher = Watcher(lambda *_: None, lambda *_: None, lambda *_: None, self.notes.append)
        with open_store(self.folder / "results.db") as store:
            return NightSession(prepared, Path("cache"), store, watcher, "kvfarm nightly", parts).run()

    @property
    def page(self) -> str:
        return (self.folder / "out" / "index.html").read_text()

    @property
    def results(self) -> NightInfo:
        return decode(NightInfo, json.loads((self.folder / "out" / "results.json").read_text()))

    @property
    def junit(self) -> ET.Element:
        return ET.parse(self.folder / "out" / "junit.xml").getroot()


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export_tiny: ExportTiny) -> Nights:
    monkeypatch.chdir(tmp_path)
    devices = (NightDevice("host", "this machine", ""),)
    answering(monkeypatch, lambda meant: Discovered(meant.inventory, ("host",), devices))
    artifact = export_tiny(ExportRecipe())
    return Nights(tmp_path, Resolved(Side("s", "s", artifact.id, "{}"), artifact, SessionRecipe()))


def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Selection], Discovered]) -> None:
    monkeypatch.setattr(discover, "discover", lambda meant, address: answer(meant))


def test_a_night_is_its_parts_in_order(nights: Nights) -> None:
    night = nights.run()
    assert nights.log == ["calibrate", "check", "measure", "gate"]
    assert (night.word, night.exit_code) == ("PASS", 0)
    assert nights.results == night
    folder = nights.folder / "out" / night.night
    assert {f.name for f in folder.iterdir() if f.is_file()} == {
        "index.html",
        "junit.xml",
        "results.json",
        "summary.md",
    }
    assert f'href="{night.night}/gate/index.html"' in nights.page
    assert 'href="gate/index.html"' in (folder / "index.html").read_text()
    assert nights.page.index("no worse than the baseline") < nights.page.index("Parts of the night")


@pytest.mark.parametrize(
    ("words", "word", "code"),
    [
        ({"check": "WRONG", "gate": "REGRESSED"}, "WRONG", 5),
        ({"gate": "REGRESSED", "measure": "INVALID"}, "REGRESSED", 1),
        ({"gate": "INCONCLUSIVE", "check": "INVALID"}, "INVALID", 4),
        ({"gate": "INCONCLUSIVE"}, "INCONCLUSIVE", 3),
        ({"calibrate": "REGRESSED"}, "PASS", 0),
    ],
)
def test_the_worst_part_decides(nights: Nights, words: dict[str, NightWord], word: str, code: int) -> None:
    night = nights.run(words)
    assert (night.word, night.exit_code) == (word, code)
    green = 'class="verdict passed"' in nights.page
    assert green == (word == "PASS")
    root = nights.junit
    red = root.findall(".//failure") + root.findall(".//error")
    assert bool(red) == (word != "PASS")


@pytest.mark.parametrize("at", ["calibrate", "check", "measure", "gate"])
def test_a_killed_night_goes_on_and_repeats_no_part(nights: Nights, at: str) -> None:
    with pytest.raises(Killed):
        nights.run(errors={at: Killed()})
    assert nights.results.word == "INVALID"
    assert "The night is not over" in nights.page
    before = list(nights.log)
    night = nights.run()
    assert nights.log[len(before) :] == ["calibrate", "check", "measure", "gate"][len(before) - 1 :]
    assert (night.word, night.starts) == ("PASS", 2)
    assert night.night == nights.results.night
    assert any(note.startswith(f"going on with night {night.night}") for note in nights.notes)
    assert nights.run().night != night.night, "a night that is over is not gone on with"


def test_other_settings_are_another_night(nights: Nights) -> None:
    with pytest.raises(Killed):
        nights.run(errors={"gate": Killed()})
    nights.run(settings=replace(nights.settings, candidate="int4"))
    assert nights.log.count("calibrate") == 2


def test_infrastructure_is_no_wrong_answer_and_the_night_goes_on(nights: Nights) -> None:
    night = nights.run(errors={"check": InfrastructureError("Ray did not start\nat all")})
    assert (night.word, night.exit_code) == ("INVALID", 4)
    assert nights.log[-1] == "gate"
    assert night.parts[1].sentence == "Ray did not start"
    assert night.parts[1].page == ""


def test_where_nobody_answers_nothing_is_tried(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = (NightDevice("host", "", "", "no route"),)
    answering(monkeypatch, lambda meant: Discovered(meant.inventory, ("host",), silent))
    night = nights.run()
    assert (night.word, night.exit_code, nights.log) == ("INVALID", 4, [])
    assert "host did not answer: no route" in nights.page


def test_devices_are_asked_once_a_night(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        nights.run(errors={"gate": Killed()})
    answering(monkeypatch, lambda meant: pytest.fail("asked again"))
    assert nights.run().word == "PASS"


def test_nights_of_one_name_are_one_history(nights: Nights) -> None:
    first = nights.run({"gate": "REGRESSED"})
    second = nights.run()
    nights.run(settings=replace(nights.settings, name="other", report="other"))
    history = nights.page.split('id="history"')[1].split('id="provenance"')[0]
    assert f'href="{first.night}/index.html"' in history
    assert history.count("Gate says REGRESSED") == 1
    assert "this night" in history
    assert (nights.folder / "out" / second.night / "index.html").read_text().count(
        f"../{first.night}/index.html"
    ) == 1
    assert "about 0.0 s left to the night" in "\n".join(nights.notes)


def test_only_the_parts_that_are_wanted(nights: Nights) -> None:
    night = nights.run(settings=replace(nights.settings, parts=("check",)))
    assert nights.log == ["check"]
    assert night.word == "PASS"
    assert "All that this night looked at passed" in nights.page


def test_two_nights_in_one_folder_are_refused(nights: Nights) -> None:
    with _alone(Path("cache") / "nights"), pytest.raises(NightError, match="another night is at work here"):
        nights.run()
    assert nights.log == []


def test_a_drill_is_loud(nights: Nights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from harness.nightly.settings import DrillSettings

    summary = tmp_path / "step.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    drill = DrillSettings(slowdown=0.05, mutant="window one too wide")
    night = nights.run(settings=replace(nights.settings, drill=drill))
    for text in (nights.page, summary.read_text()):
        assert "slowed down by 5.0 %" in text
        assert "window one too wide" in text
        assert "Nothing here is said of a release" in text
    assert night.drill


def test_the_parts_own_junit_is_taken_in(nights: Nights) -> None:
    with pytest.raises(Killed):
        nights.run(errors={"gate": Killed()})
    folder = nights.folder / "out" / nights.results.night / "check"
    (folder / "junit.xml").write_text(
        '<testsuites><testsuite name="host[hybrid]"><testcase name="p1"/></testsuite></testsuites>'
    )
    nights.run()
    assert [suite.get("name") for suite in nights.junit] == ["night", "check: host[hybrid]"]


def worse(metric: str, verdict: GateVerdict = "REGRESSED") -> NightWord:
    gate = sample_gate().gate
    assert gate is not None
    cell = exact_cell("host", verdict) if metric == "tokens" else gate_cell("host", metric, verdict, 0.06)
    return word_of(replace(gate, cells=(cell,), verdict=verdict, exit_code=0 if verdict == "PASS" else 1))


def test_other_tokens_are_wrong_and_slower_ones_are_not() -> None:
    assert worse("tokens") == "WRONG"
    assert worse("decode") == "REGRESSED"
    assert worse("tokens", "PASS") == "PASS"


@pytest.mark.parametrize("verdict", ["PASS", "INVALID"])
def test_an_expired_waiver_is_the_headline_of_the_night_it_fails(verdict: GateVerdict) -> None:
    gate = sample_gate().gate
    assert gate is not None
    failed = replace(gate, cells=(gate_cell("host", "ttft", verdict, 0.0),), verdict=verdict, exit_code=1)
    assert headline_of(failed, word_of(failed)) == "A waiver has expired"
    slower = replace(failed, verdict="REGRESSED")
    assert headline_of(slower, word_of(slower)) == "The candidate is worse than the baseline"
