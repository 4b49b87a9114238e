"""The verdict: "all that was planned passed" is the only green."""

from __future__ import annotations

from typing import Any

import pytest

from reports.results import RunResults
from reports.view import summary_line, verdict
from tests.reports.sample import (
    AFTER,
    HOST,
    LOST,
    PHONE,
    check,
    device,
    failed_check,
    leg,
    run,
    sample_run,
    stopped_check,
)


def words(results: RunResults) -> str:
    found = verdict(results)
    return " ".join((found.headline, found.sentence, *found.remarks))


def test_all_that_was_planned_passed_is_green() -> None:
    found = verdict(run())
    assert found.ok
    assert found.state == "passed"
    assert found.headline == "All that was planned passed"
    assert found.sentence == (
        "All 6 planned checks passed on 1 device. The one planned measurement was taken."
    )
    assert found.remarks == ()


@pytest.mark.parametrize(
    ("changes", "state", "said"),
    [
        ({"checks": (check(), failed_check())}, "failed", "1 of 2 planned checks passed; 1 failed"),
        (
            {"checks": (check(), stopped_check())},
            "incomplete",
            "1 of 2 planned checks passed and none failed; 1 stopped by infrastructure",
        ),
        ({"checks": (check(),), "planned_checks": 3}, "incomplete", "none failed; 2 not run"),
        ({"checks": (check(), check(outcome="not_run"))}, "incomplete", "none failed; 1 not run"),
        ({"planned_legs": 4}, "incomplete", "1 of 4 planned measurements were taken"),
        (
            {"legs": (leg(validity="INVALID"),)},
            "incomplete",
            "1 of 1 planned measurement was taken (1 invalid)",
        ),
        ({"infrastructure": ("adb is not there",)}, "incomplete", "1 infrastructure error happened outside"),
        ({"finished_at": None}, "interrupted", "The run was interrupted, or was still going"),
        ({"checks": (), "legs": ()}, "incomplete", "Nothing was planned"),
    ],
)
def test_nothing_else_is_green(changes: dict[str, Any], state: str, said: str) -> None:
    results = run(**changes)
    assert verdict(results).state == state
    assert not verdict(results).ok
    assert said in words(results)


def test_a_noisy_measurement_stays_green_and_is_named() -> None:
    found = verdict(run(legs=(leg(validity="NOISY"),)))
    assert found.ok
    assert found.remarks == ("1 measurement is noisy and can decide nothing.",)


def test_an_infrastructure_error_is_never_counted_as_a_failure() -> None:
    counts = verdict(run(checks=(check(), stopped_check()))).counts
    assert (counts.passed, counts.failed, counts.infrastructure, counts.not_run) == (1, 0, 1, 0)


def test_a_failure_outweighs_an_interruption_and_both_are_said() -> None:
    found = verdict(run(checks=(failed_check(),), finished_at=None))
    assert found.state == "failed"
    assert found.headline == "1 check failed, and the run did not finish"


def test_what_is_missing_is_no_ground_for_a_release() -> None:
    for changes in ({"finished_at": None}, {"planned_checks": 9}):
        assert "this run is no ground for a release" in words(run(**changes))


def test_the_sentence_names_where_it_failed() -> None:
    assert "Failing: host (hybrid-int8-kv) and pixel-9 (after-hybrid)." in verdict(sample_run()).sentence


def test_many_failing_devices_are_counted_not_listed() -> None:
    failures = tuple(failed_check(f"phone-{number}") for number in range(6))
    sentence = verdict(run(checks=failures)).sentence
    assert (
        "Failing: phone-0 (after-hybrid), phone-1 (after-hybrid), phone-2 (after-hybrid) and 3 more devices."
        in (sentence)
    )


def test_simulated_devices_are_named_beside_the_verdict() -> None:
    devices = (device(HOST), device(PHONE, simulated="a virtual phone"))
    assert "1 of 2 devices is simulated (pixel-9): what it shows is not proof" in words(run(devices=devices))


def test_planned_and_done_are_counted_apart() -> None:
    counts = verdict(sample_run()).counts
    done = counts.passed + counts.failed + counts.infrastructure
    assert (counts.planned_checks, done, counts.not_run) == (54, 42, 12)
    assert (counts.planned_legs, counts.measured, counts.legs_missing) == (10, 8, 2)
    assert (counts.noisy, counts.invalid) == (1, 1)


def test_the_summary_line_of_a_green_run() -> None:
    assert summary_line(run()) == "PASSED: 6/6 checks passed; 1/1 measurements; 1 device"


def test_the_summary_line_tells_all_that_is_wrong() -> None:
    assert summary_line(sample_run()) == (
        "FAILED: 39/54 checks passed, 2 failed, 1 stopped by infrastructure, 12 not run;"
        " 1 infrastructure error outside the checks; 8/10 measurements, 1 noisy, 1 invalid;"
        " 3 devices (1 simulated); the run did not finish"
    )


def test_a_lost_device_does_not_count_as_checked() -> None:
    checks = (check(HOST, AFTER), check(LOST, AFTER, outcome="not_run"))
    assert verdict(run(checks=checks, devices=(device(HOST), device(LOST)))).state == "incomplete"


def test_what_the_model_cannot_do_is_neither_green_nor_red() -> None:
    unsupported = check(outcome="not_supported", message="this graph returns the last row only")
    found = verdict(run(checks=(check(), unsupported), planned_checks=2))
    assert found.ok
    assert found.headline == "All that the model supports passed"
    assert "1 of 2 planned checks passed and none failed; 1 not supported by the model" in found.sentence
    assert any("cannot do" in remark for remark in found.remarks)
    # Where nothing else was planned, nothing is proved.
    alone = run(checks=(unsupported,), planned_checks=1, legs=(), planned_legs=0)
    assert verdict(alone).state == "incomplete"
