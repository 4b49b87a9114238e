"""The mutants themselves: the catalogue is covered, and each property of the suite goes red.

The whole score is measured by ``make mutants``; here is a handful, one mutant for each property.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli import app, run
from harness.mutants import score
from harness.mutants.catalogue import CANNOT_EXIST, CATALOGUE, MUTANTS
from harness.mutants.models import MODELS
from harness.mutants.mutant import RIGHT, Mutant
from harness.mutants.running import NET, Judged, Workshop, judge, properties
from harness.mutants.seams import method
from kvengine.decoder import Decoder
from kvengine.errors import EngineFailure
from tests.reports.sample import mutation

MUTANT = {mutant.name: mutant for mutant in MUTANTS}

# A mutant that each property finds.
FOUND_BY = {
    "P1": "local layers on the global theta",
    "P2": "newest evicted",
    "P3": "write at max_length",
    "P4": "inclusive window tuple under int4",
    "P5": "chunk trimmed for one token",
    "P6": "last layer on the wrong theta under int4",
    "P7": "stride of the first row",
    "P7b": "beam reorder of one layer",
    "P8": "overflow cut off",
    "P9": "mask of -13",
    "P10": "rewind refused too soon",
    "P10b": "another prompt's prefix",
    "P11": "restored window loses its geometry",
    "P11b": "failed restore leaves damage",
    "P12": "two sessions, one buffer",
    "P13": "codes by flush group",
    "P14": "one KV head for all, under int4",
    "prompt lookup gives the greedy tokens": "rejected drafts move nothing back",
    "compaction hides and keeps distances": "shift by the global theta",
    NET: "one sink more",
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("mutants"))


def test_every_number_of_the_catalogue_is_a_mutant_or_has_a_reason() -> None:
    numbers = {mutant.number for mutant in MUTANTS}
    assert numbers | set(CANNOT_EXIST) == set(CATALOGUE)
    assert not numbers & set(CANNOT_EXIST)


def test_there_are_enough_and_each_has_its_own_name() -> None:
    assert len(MUTANT) == len(MUTANTS) >= 50
    assert {mutant.model for mutant in MUTANTS} == set(MODELS)


def test_every_property_has_a_mutant() -> None:
    assert set(FOUND_BY) == set(properties())


@pytest.mark.parametrize(("name", "mutant"), FOUND_BY.items(), ids=[name.split()[0] for name in FOUND_BY])
def test_a_property_finds_its_mutant_and_not_the_right_engine(
    name: str, mutant: str, workshop: Workshop
) -> None:
    broken = MUTANT[mutant]
    (kill,) = judged(workshop, broken, name).kills
    assert kill.property == name
    right = judged(workshop, replace(broken, name=RIGHT, patches=()), name)
    assert (right.kills, right.crashes) == ((), ())
    assert right.programs > 0


def judged(workshop: Workshop, mutant: Mutant, name: str) -> Judged:
    return judge(workshop, mutant, only=[name])


def test_an_engine_that_dies_is_no_kill(workshop: Workshop) -> None:
    def dies(run_step: object, decoder: Decoder, *arguments: object, **named: object) -> None:
        raise RuntimeError("a kernel that cannot")

    found = judged(workshop, Mutant("dies", 0, "", "", (method(Decoder, "_run", dies),)), "P1")
    assert found.kills == ()
    assert found.crashes == ("P1: RuntimeError: a kernel that cannot",)


def test_a_step_that_onnxruntime_refuses_is_no_kill(workshop: Workshop) -> None:
    """An EngineFailure is a refusal to the program; it must not count either."""

    def fails(advance: object, decoder: Decoder, *arguments: object) -> None:
        decoder._failed = True
        raise EngineFailure("onnxruntime failed")

    found = judged(workshop, Mutant("fails", 0, "", "", (method(Decoder, "_advance", fails),)), "P1")
    assert found.kills == ()
    assert found.crashes == ("P1: onnxruntime failed",)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_nothing_of_a_mutant_is_left(mutant: Mutant) -> None:
    before = [getattr(patch.owner, patch.name) for patch in mutant.patches]
    with mutant.applied():
        for patch, right in zip(mutant.patches, before, strict=True):
            assert getattr(patch.owner, patch.name) is not right
    assert [getattr(patch.owner, patch.name) for patch in mutant.patches] == before


def test_the_score_comes_back_from_where_it_is_kept(tmp_path: Path) -> None:
    assert score.load(tmp_path) is None
    score.save(mutation("abc"), tmp_path)
    assert score.load(tmp_path) == mutation("abc")
    (tmp_path / score.FILE).write_text("{}")
    assert score.load(tmp_path) is None


def test_what_one_property_alone_finds() -> None:
    first, second = mutation("abc").mutants
    third = replace(second, name="third", killed_by="P7", also=("P7b", NET))
    assert score.only_by([first, second, third], NET) == {"P3": ["write at max_length"], "P7": ["third"]}


def test_the_command_judges_and_keeps_only_a_whole_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["mutants", "write at max_length", "--examples", "5", "--workers", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    said = json.loads(result.stdout)
    (row,) = said["mutants"]
    assert {"name", "source", "killed_by", "examples", "seconds"} <= set(row)
    assert (row["name"], row["killed_by"]) == ("write at max_length", "P3")
    assert (said["killed"], said["total"], result.exit_code) == (1, 1, 0)
    assert score.load(tmp_path / ".kvfarm") is None


def test_an_unknown_mutant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["mutants", "no such bug"]) == 2
    assert "no such bug" in capsys.readouterr().err
