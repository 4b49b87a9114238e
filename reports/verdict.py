"""What the run as a whole says. "All that was planned passed" is the only green."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reports.results import RunResults
from reports.text import joined, plural

State = Literal["passed", "failed", "interrupted", "incomplete"]


MOST_PLACES = 3  # failing devices named in the sentence


@dataclass(frozen=True)
class Counts:
    """Planned against done. ``not_run`` and ``legs_missing`` were planned and left no result."""

    planned_checks: int
    passed: int
    failed: int
    infrastructure: int
    not_run: int
    not_supported: int  # checks that need what the model under test cannot do
    planned_legs: int
    measured: int
    legs_missing: int
    noisy: int
    invalid: int
    errors: int  # infrastructure errors that belong to no single check
    devices: int
    simulated: int

    @property
    def decided(self) -> int:
        """Checks that gave an answer about the engine."""
        return self.passed + self.failed


@dataclass(frozen=True)
class Verdict:
    """``word`` for a terminal, ``headline`` in a few words, ``sentence`` for the signature.

    remarks: what the signer must know besides: an interruption, infrastructure errors, simulation.
    """

    state: State
    word: str
    headline: str
    sentence: str
    remarks: tuple[str, ...]
    counts: Counts

    @property
    def ok(self) -> bool:
        """True only if all that was planned passed."""
        return self.state == "passed"


def count(results: RunResults) -> Counts:
    """Planned checks and legs, and what became of them."""
    outcomes = [check.outcome for check in results.checks]
    passed, failed = outcomes.count("passed"), outcomes.count("failed")
    infrastructure, unsupported = outcomes.count("infrastructure"), outcomes.count("not_supported")
    answered = passed + failed + infrastructure + unsupported
    validities = [leg.validity for leg in results.legs]
    return Counts(
        planned_checks=results.planned_checks,
        passed=passed,
        failed=failed,
        infrastructure=infrastructure,
        not_run=max(results.planned_checks - answered, outcomes.count("not_run")),
        not_supported=unsupported,
        planned_legs=results.planned_legs,
        measured=len(validities),
        legs_missing=max(results.planned_legs - len(validities), 0),
        noisy=validities.count("NOISY"),
        invalid=validities.count("INVALID"),
        errors=len(results.infrastructure),
        devices=len(results.devices),
        simulated=sum(bool(device.simulated) for device in results.devices),
    )


def verdict(results: RunResults) -> Verdict:
    """The state of the run and the sentence that a release manager signs."""
    counts = count(results)
    state = _state(results, counts)
    return Verdict(
        state=state,
        word=state.upper(),
        headline=_headline(state, results, counts),
        sentence=_sentence(state, results, counts),
        remarks=tuple(_remarks(state, results, counts)),
        counts=counts,
    )


def summary_line(results: RunResults) -> str:
    """One line for a terminal: ``FAILED: 20/24 checks passed, 2 failed, 1 not run; 9/9 measurements``."""
    found = verdict(results)
    counts = found.counts
    checks = [f"{counts.passed}/{counts.planned_checks} checks passed", *_shortfall(counts)]
    legs = [f"{counts.measured}/{counts.planned_legs} measurements", *_leg_remarks(counts)]
    devices = plural(counts.devices, "device")
    if counts.simulated:
        devices += f" ({counts.simulated} simulated)"
    parts = [", ".join(checks), ", ".join(legs), devices]
    if counts.errors:
        parts.insert(1, plural(counts.errors, "infrastructure error") + " outside the checks")
    if results.finished_at is None:
        parts.append("the run did not finish")
    return f"{found.word}: {'; '.join(parts)}"


def _state(results: RunResults, counts: Counts) -> State:
    if counts.failed:
        return "failed"
    if results.finished_at is None:
        return "interrupted"
    gaps = counts.not_run + counts.infrastructure + counts.errors + counts.legs_missing + counts.invalid
    planned = counts.planned_checks + counts.planned_legs - counts.not_supported
    return "passed" if planned and not gaps else "incomplete"


def _headline(state: State, results: RunResults, counts: Counts) -> str:
    if state == "failed":
        unfinished = ", and the run did not finish" if results.finished_at is None else ""
        return f"{plural(counts.failed, 'check')} failed{unfinished}"
    if state == "passed":
        return "All that the model supports passed" if counts.not_supported else "All that was planned passed"
    if state == "interrupted":
        return "The run did not finish"
    if not counts.planned_checks and not counts.planned_legs:
        return "Nothing was planned"
    return "Not all that was planned was done"


def _sentence(state: State, results: RunResults, counts: Counts) -> str:
    parts = (_about_checks(state, results, counts), _about_failures(results), _about_legs(state, counts))
    return " ".join(part for part in parts if part)


def _remarks(state: State, results: RunResults, counts: Counts) -> list[str]:
    remarks = []
    if results.finished_at is None:
        remarks.append("The run was interrupted, or was still going when this page was written.")
    if counts.errors:
        remarks.append(f"{plural(counts.errors, 'infrastructure error')} happened outside the checks.")
    if results.not_run:
        verb = "was" if len(results.not_run) == 1 else "were"
        remarks.append(f"{plural(len(results.not_run), 'test')} {verb} for other devices than these.")
    if again := sum(
        map(bool, [*(c.retries for c in results.checks), *(leg.retries for leg in results.legs)])
    ):
        remarks.append(f"{plural(again, 'result')} needed another try after an infrastructure failure.")
    if aside := [device.name for device in results.devices if device.quarantined]:
        remarks.append(f"Quarantined during the run: {joined(aside)}.")
    if state in ("interrupted", "incomplete"):
        remarks.append("What is missing is not proved: this run is no ground for a release.")
    if counts.not_supported:
        verb, proof = ("needs", "It proves") if counts.not_supported == 1 else ("need", "They prove")
        remarks.append(
            f"{plural(counts.not_supported, 'check')} {verb} what the model under test cannot do; the grid "
            f"below says what. {proof} nothing either way."
        )
    if state == "passed" and counts.noisy:
        verb = "is" if counts.noisy == 1 else "are"
        remarks.append(f"{plural(counts.noisy, 'measurement')} {verb} noisy and can decide nothing.")
    if counts.simulated:
        remarks.append(_about_simulation(results, counts))
    return remarks


def _about_checks(state: State, results: RunResults, counts: Counts) -> str:
    planned = counts.planned_checks
    if not planned and not counts.decided:
        return "No check was planned."
    if state == "passed" and not counts.not_supported:
        return (
            f"All {plural(counts.passed, 'planned check')} passed"
            f" on {plural(_checked_devices(results), 'device')}."
            if counts.passed != 1
            else "The one planned check passed."
        )
    shortfall = _shortfall(counts)
    tail = f"; {joined(shortfall)}" if shortfall else ""
    head = f"{counts.passed} of {plural(planned, 'planned check')} passed"
    return f"{head}{tail}." if counts.failed else f"{head} and none failed{tail}."


def _about_failures(results: RunResults) -> str:
    failing: dict[str, dict[str, None]] = {}  # device to its recipes, in order
    for check in results.checks:
        if check.outcome == "failed":
            failing.setdefault(check.device, {})[check.recipe] = None
    places = [f"{device} ({joined(list(recipes))})" for device, recipes in failing.items()]
    if len(places) > MOST_PLACES:
        places[MOST_PLACES:] = [plural(len(places) - MOST_PLACES, "more device")]
    return f"Failing: {joined(places)}." if places else ""


def _about_legs(state: State, counts: Counts) -> str:
    if not counts.planned_legs and not counts.measured:
        return "No measurement was planned."
    if state == "passed":
        return (
            f"All {plural(counts.planned_legs, 'planned measurement')} were taken."
            if (counts.planned_legs != 1)
            else "The one planned measurement was taken."
        )
    remarks = _leg_remarks(counts)
    tail = f" ({joined(remarks)})" if remarks else ""
    verb = "was" if counts.planned_legs == 1 else "were"
    return f"{counts.measured} of {plural(counts.planned_legs, 'planned measurement')} {verb} taken{tail}."


def _about_simulation(results: RunResults, counts: Counts) -> str:
    names = joined([device.name for device in results.devices if device.simulated])
    verb = "is" if counts.simulated == 1 else "are"
    return (
        f"{counts.simulated} of {plural(counts.devices, 'device')} {verb} simulated ({names}):"
        " what it shows is not proof for real hardware."
    )


def _shortfall(counts: Counts) -> list[str]:
    parts = []
    if counts.failed:
        parts.append(f"{counts.failed} failed")
    if counts.infrastructure:
        parts.append(f"{counts.infrastructure} stopped by infrastructure")
    if counts.not_run:
        parts.append(f"{counts.not_run} not run")
    if counts.not_supported:
        parts.append(f"{counts.not_supported} not supported by the model")
    return parts


def _leg_remarks(counts: Counts) -> list[str]:
    remarks = []
    if counts.noisy:
        remarks.append(f"{counts.noisy} noisy")
    if counts.invalid:
        remarks.append(f"{counts.invalid} invalid")
    return remarks


def _checked_devices(results: RunResults) -> int:
    return len({check.device for check in results.checks if check.outcome == "passed"})
