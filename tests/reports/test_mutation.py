"""The mutation score in the report: what it says, and of which commit."""

from __future__ import annotations

from dataclasses import replace

from reports.mutation import mutation_view
from reports.page import html
from tests.reports.sample import mutation, run


def test_a_run_without_a_score_shows_none() -> None:
    assert mutation_view(run()) is None
    assert "Would these checks notice?" not in html(run())


def test_the_score_is_shown_with_every_mutant() -> None:
    results = replace(run(), mutation=mutation("abc"))
    view = mutation_view(results)
    assert view is not None
    assert view.complete
    assert view.sentence.startswith("2 of 2 known KV-cache bugs")
    assert "10,040 programs" in view.sentence
    page = html(results)
    for said in ("window one too wide", "ORT#25927", "P3", "a kernel of one CPU", view.sentence):
        assert said in page


def test_a_survivor_is_not_hidden() -> None:
    view = mutation_view(replace(run(), mutation=mutation("abc", survivor=True)))
    assert view is not None
    assert not view.complete
    assert view.sentence.startswith("1 of 2")
    assert view.rows[1][3] == "nothing"


def test_the_commit_of_the_score_is_named_and_compared() -> None:
    here = replace(run(), provenance={"commit": "abc"})
    same = mutation_view(replace(here, mutation=mutation("abc")))
    other = mutation_view(replace(here, mutation=mutation("def")))
    assert same is not None
    assert other is not None
    assert "this run is of the same commit" in same.remark
    assert "commit def" in other.remark
    assert "this run is of abc" in other.remark
