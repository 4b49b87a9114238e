"""What a night found, as plain data, and its verdict in words. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from reports import text

NightWord = Literal["PASS", "WRONG", "REGRESSED", "INCONCLUSIVE", "INVALID"]
# The worst decides. Nothing but PASS is 0; 2 is a refusal, as of every command.
EXIT_CODES: dict[NightWord, int] = {"WRONG": 5, "REGRESSED": 1, "INVALID": 4, "INCONCLUSIVE": 3, "PASS": 0}
SYMBOLS: dict[NightWord, str] = {
    "PASS": "✓",
    "WRONG": "✕",
    "REGRESSED": "✕",
    "INCONCLUSIVE": "?",
    "INVALID": "∅",
}
MEANS: dict[NightWord, str] = {
    "PASS": "right, and no worse",
    "WRONG": "wrong answers",
    "REGRESSED": "slower or heavier",
    "INCONCLUSIVE": "a person decides",
    "INVALID": "not measured",
}
TONES: dict[NightWord, str] = {
    "PASS": "passed",
    "WRONG": "failed",
    "REGRESSED": "failed",
    "INCONCLUSIVE": "incomplete",
    "INVALID": "incomplete",
}


@dataclass(frozen=True)
class NightPart:
    """One finished part. decides: its word is part of the night's; calibration informs, and takes rights.

    sentence: what it found. page: its report, seen from the night's folder; "" for none.
    """

    name: str
    title: str
    word: NightWord
    headline: str
    sentence: str
    remarks: tuple[str, ...] = ()
    decides: bool = True
    run_id: str = ""
    page: str = ""
    started_at: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class NightDevice:
    """A device that was sought. model, simulated: "" where it did not answer, and error says why."""

    name: str
    model: str
    simulated: str
    error: str = ""


@dataclass(frozen=True)
class NightInfo:
    """One night. planned: names of its parts. drill: what was made wrong on purpose. starts: how often the
    command was started until the night was over. calibration: how often the gate is wrong here, in words.
    """

    night: str  # its id
    name: str  # nights of one name are one history
    started_at: str  # ISO 8601, UTC
    finished_at: str | None
    command: str
    config: str
    model: str
    baseline: str
    candidate: str
    planned: tuple[str, ...]
    drill: str = ""
    starts: int = 1
    devices: tuple[NightDevice, ...] = ()
    parts: tuple[NightPart, ...] = ()
    calibration: str = ""
    provenance: dict[str, str] = field(default_factory=dict)
    format: Literal["kvfarm-night/1"] = "kvfarm-night/1"

    @property
    def word(self) -> NightWord:
        """Of the parts that decide, the worst; INVALID for a night that is not over or decided nothing."""
        found = [part.word for part in self.parts if part.decides]
        if self.finished_at is None or not found:
            found.append("INVALID")
        return min(found, key=list(EXIT_CODES).index)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.word]


@dataclass(frozen=True)
class NightSummary:
    """What the index page, the Markdown and the terminal say. tone: a class of style.css."""

    word: str
    symbol: str
    tone: str
    headline: str
    sentence: str
    remarks: tuple[str, ...]


def summary(night: NightInfo) -> NightSummary:
    """The verdict sentence first, then what else the reader must know."""
    word = night.word
    if night.finished_at is None:
        missing = [name for name in night.planned if name not in {part.name for part in night.parts}]
        sentence = f"Still to do: {text.joined(missing)}. The same command goes on where it stopped."
        headline = "The night is not over"
        return NightSummary("UNFINISHED", "‖", "interrupted", headline, sentence, _remarks(night))
    deciding = [part for part in night.parts if part.decides and part.word == word]
    if word == "PASS":
        headline = "The candidate is right, and no worse than the baseline"
        if {"check", "gate"} - {part.name for part in night.parts}:
            headline = "All that this night looked at passed"
    else:
        headline = deciding[0].headline if deciding else "Nothing was decided"
    parts = [f"{part.title}: {part.sentence}" for part in deciding]
    return NightSummary(word, SYMBOLS[word], TONES[word], headline, " ".join(parts), _remarks(night))


def _remarks(night: NightInfo) -> tuple[str, ...]:
    remarks = [remark for part in night.parts for remark in part.remarks]
    silent = [device for device in night.devices if device.error]
    remarks += [f"{device.name} did not answer: {device.error}" for device in silent]
    remarks += [
        f"{device.name} is simulated ({device.simulated}): what it shows is not proof for real hardware."
        for device in night.devices
        if device.simulated
    ]
    if night.starts > 1:
        remarks.append(f"The night was interrupted and gone on with {text.plural(night.starts - 1, 'time')}.")
    return tuple(dict.fromkeys(remarks))


@dataclass(frozen=True)
class NightLine:
    """One earlier night in the history."""

    night: str
    when: str
    word: str
    symbol: str
    tone: str
    headline: str
    took: str
    drill: bool


def lines(nights: Sequence[NightInfo]) -> tuple[NightLine, ...]:
    """The history, newest first."""
    found = []
    for night in sorted(nights, key=lambda night: (night.started_at, night.night), reverse=True):
        said = summary(night)
        took = text.elapsed(night.started_at, night.finished_at)
        when = text.moment(night.started_at)
        line = (said.word, said.symbol, said.tone, said.headline, took, bool(night.drill))
        found.append(NightLine(night.night, when, *line))
    return tuple(found)
