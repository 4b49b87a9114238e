"""The index page of a night: the verdict first, hostile names harmless, nothing green but PASS."""

from __future__ import annotations

from dataclasses import replace

from reports import gate_night
from reports.gate_night_page import html
from tests.reports.night_sample import HOSTILE, earlier_night, sample_night
from tests.reports.parsed import Page


def test_the_verdict_comes_first_and_names_what_decided() -> None:
    page = Page(html(sample_night(), (sample_night(), earlier_night())))
    words = page.one("section", class_="verdict").words
    assert words.startswith("✕ WRONG The KV cache is wrong Correctness: 1 of 19 checks failed")
    assert "does not gate" in words
    assert "virtual1 is simulated" in words
    assert "interrupted and gone on with 1 time" in words


def test_a_part_that_was_not_reached_is_shown() -> None:
    words = Page(html(sample_night(), ())).one("section", id="parts").words
    assert "measure not reached" in words
    assert "5 WRONG (wrong answers)" in words


def test_what_devices_say_is_text() -> None:
    source = html(sample_night(), (sample_night(),))
    assert HOSTILE not in source
    assert "&lt;img src=x" in source


def test_the_history_has_each_night_with_its_own_words() -> None:
    newest, older = gate_night.lines((earlier_night(), sample_night()))
    assert (newest.word, newest.drill, newest.took) == ("WRONG", True, "6 min 00 s")
    assert (older.word, older.drill, older.tone) == ("PASS", False, "passed")


def test_a_night_that_is_not_over_is_not_green() -> None:
    night = replace(earlier_night(), finished_at=None, parts=earlier_night().parts[:1])
    told = gate_night.summary(night)
    assert (told.word, told.tone, night.exit_code) == ("UNFINISHED", "interrupted", 4)
    assert "Still to do: check and gate." in told.sentence


def test_a_night_that_decided_nothing_is_invalid() -> None:
    night = replace(earlier_night(), parts=earlier_night().parts[:1], planned=("calibrate",))
    assert (night.word, gate_night.summary(night).headline) == ("INVALID", "Nothing was decided")
