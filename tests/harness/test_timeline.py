"""A run's timeline: valid trace events, everything in it, and what infrastructure stopped is counted."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from harness.spans import Recorder, recording_nothing
from harness.store import open_store
from harness.store.protocol import Flakes, Part, Span
from harness.timeline import trace
from reports.results import RunResults
from tests.reports.sample import sample_run

AT = 1_700_000_000.0

CHECK_PARTS = (
    Part("wait", "for the machine's other devices", AT + 1.0, AT + 1.5),
    Part("deploy", "abc", AT + 1.5, AT + 2.0),
    Part("program", "3 operations", AT + 2.5, AT + 3.0),
    Part("retry", "RunnerDied: killed", AT + 3.0, AT + 3.0),
    Part("session", "one", AT + 2.0, AT + 5.0),
    Part("session", "two", AT + 2.5, AT + 6.0),  # neither beside nor inside of the first
)
SPANS = (
    Span("pixel", "lease", "lease 17", AT, None),
    Span("pixel", "check", "hybrid · p01", AT + 1.0, AT + 4.0, "passed", 1, CHECK_PARTS),
    Span("pixel", "quarantine", "it is silent", AT + 7.0, AT + 7.0),
    Span("host", "leg", "int4 · tiny", AT + 0.5, AT + 9.0, "VALID"),
)


def check_trace_events(made: dict[str, Any]) -> None:
    """What Perfetto's importer asks of a file; see "Trace Event Format" and its json_trace_parser."""
    json.dumps(made, allow_nan=False)
    lanes = defaultdict[tuple[int, int], list[tuple[int, int]]](list)
    named = {(e["pid"], e["tid"]) for e in made["traceEvents"] if e["name"] == "thread_name"}
    processes = {e["pid"] for e in made["traceEvents"] if e["name"] == "process_name"}
    for event in made["traceEvents"]:
        assert event["ph"] in "MXi"
        assert event["pid"] in processes
        if event["ph"] == "X":
            assert isinstance(event["ts"], int)
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert (event["pid"], event["tid"]) in named
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "i":
            assert event["s"] in "gpt"
    for lane in lanes.values():
        for began, ended in lane:
            for other, other_end in lane:
                apart = other >= ended or other_end <= began
                nested = (other >= began and other_end <= ended) or (other <= began and other_end >= ended)
                assert apart or nested, "two events of one thread overlap"


def test_a_trace_is_one_that_perfetto_takes_and_has_everything() -> None:
    made = trace(sample_run(), SPANS)
    check_trace_events(made)
    events = made["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["pixel", "host"]
    kinds = sorted(event["cat"] for event in events if event["ph"] != "M")
    assert kinds == sorted([span.kind for span in SPANS] + [part.kind for part in CHECK_PARTS])
    (lease,) = [event for event in events if event.get("cat") == "lease"]
    assert (lease["ts"], lease["dur"], "unfinished" in lease["args"]) == (0, 9_000_000, True)
    (check,) = [event for event in events if event.get("cat") == "check"]
    assert (check["ts"], check["dur"], check["args"]["retries"]) == (1_000_000, 3_000_000, 1)


def test_a_simulated_device_is_called_so() -> None:
    run = sample_run()
    device = dataclasses.replace(run.devices[0], name="pixel", simulated="virtual phone")
    made = trace(dataclasses.replace(run, devices=(device,)), SPANS)
    assert made["traceEvents"][0]["args"]["name"] == "pixel (simulated: virtual phone)"


def test_the_test_sees_what_perfetto_would_not_take() -> None:
    made = trace(sample_run(), SPANS)
    for event in made["traceEvents"]:
        event["tid"] = 1 if event["ph"] == "X" and event["pid"] == 1 else event["tid"]
    with pytest.raises(AssertionError, match="two events of one thread overlap"):
        check_trace_events(made)


@pytest.fixture
def header() -> RunResults:
    return dataclasses.replace(sample_run(), run_id="r1")


def test_what_is_told_is_kept_once_and_with_the_check_that_follows(
    tmp_path: Path, header: RunResults
) -> None:
    with open_store(tmp_path / "s.db") as store:
        store.begin_run(header)
        recorder = Recorder(lambda span: store.add_span("r1", span))
        recorder.lease("pixel", 17, AT, None)
        recorder.part("pixel", "program", "3 operations", AT + 1, AT + 2)
        recorder.part("host", "wait", "in line", AT, AT + 1)
        recorder.span(Span("pixel", "check", "p01", AT, AT + 3, "passed"))
        recorder.lease("pixel", 17, AT, AT + 9)
        recorder.flush()
        recorder.flush()
        kept = store.spans("r1")
    program = Part("program", "3 operations", AT + 1, AT + 2)
    assert kept == (
        Span("pixel", "lease", "lease 17", AT, AT + 9),
        Span("pixel", "check", "p01", AT, AT + 3, "passed", 0, (program,)),
        Span("host", "rest", "before and after", AT, AT + 1, parts=(Part("wait", "in line", AT, AT + 1),)),
    )


def test_the_flake_rate_is_of_the_newest_results_of_all_runs_but_drills(
    tmp_path: Path, header: RunResults
) -> None:
    drill = dataclasses.replace(header, run_id="d", provenance={"DRILL": "slower"})
    with open_store(tmp_path / "s.db") as store:
        assert store.flakes() == {}
        for run in (header, dataclasses.replace(header, run_id="r2"), drill):
            store.begin_run(run)
        for n in range(60):  # older, and all lost
            store.add_span("r1", Span("pixel", "check", f"p{n}", AT + n, AT, "infrastructure"))
        for n in range(98):
            store.add_span("r2", Span("pixel", "leg", f"p{n}", AT + n, AT, "VALID"))
        store.add_span("r2", Span("pixel", "check", "again", AT, AT, "passed", retries=1))
        store.add_span("r2", Span("host", "check", "wrong", AT, AT, "failed"))
        store.add_span("r2", Span("host", "lease", "lease 3", AT, AT, ""))
        store.add_span("d", Span("host", "check", "on purpose", AT, AT, "infrastructure"))
        assert store.flakes() == {"pixel": Flakes(100, 2), "host": Flakes(1, 0)}
        assert store.flakes(last=1)["pixel"].rate == 1.0
    assert math.isnan(Flakes(0, 0).rate)


def test_for_who_is_no_run_nothing_waits_in_memory() -> None:
    recorder = recording_nothing()
    with recorder.doing("pixel", "open", "abc"):
        pass
    assert recorder.whole(Span("pixel", "leg", "one", AT, AT + 1)).parts == ()
