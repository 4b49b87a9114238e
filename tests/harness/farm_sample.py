"""A farm in the middle of its work, in a real lease journal and a real store. Nothing in it was measured."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from device_agents.leases import protocol
from device_agents.leases.ledger import Ledger
from device_agents.leases.model import Request, Rules
from harness.store import open_store
from harness.store.protocol import Span
from tests.reports.sample import HOST, LOST, PHONE, sample_run

RULES = Rules()
RUN = "2026-11-25T031000Z-0a1b2c3d"
HOSTILE = '<script>alert("owned")</script>\x1b[2J'


def make_journal(folder: Path) -> Ledger:
    """host works for RUN, one phone is in quarantine, somebody waits for both."""
    ledger = Ledger(folder)

    def ask(id_: str, who: str, devices: tuple[str, ...], **more: object) -> None:
        request = Request(id_, who, f"{who}@ci-3 pid 4711", devices, len(devices), beat_s=3600, **more)  # type: ignore[arg-type]
        ledger.act(protocol.ask(request, RULES, wait=True))

    ask("1", "nightly", (HOST,), run=RUN)
    ledger.act(protocol.quarantine(LOST, f"golden job: wrong answer {HOSTILE}", "mara@desk pid 12", 900.0))
    ask("2", "mara", (HOST, LOST), priority=2)
    return ledger


def make_store(path: Path) -> None:
    with open_store(path) as store:
        began = "2026-11-25T03:10:00+00:00"
        at_work = dataclasses.replace(sample_run(), run_id=RUN, started_at=began, finished_at=None)
        for run in (sample_run(), at_work):
            store.begin_run(run)
            for device in run.devices:
                store.add_device(run.run_id, device)
            for check in run.checks:
                store.add_check(run.run_id, check)
            for leg in run.legs:
                store.add_leg(run.run_id, leg)
        now = time.time()
        store.add_span(RUN, Span(HOST, "check", "hybrid · test_p03", now - 9, now - 4, "passed"))
        for n in range(8):
            outcome = "infrastructure" if n == 3 else "passed"
            store.add_span(RUN, Span(PHONE, "check", f"p{n}", now - 99 + n, now - 98 + n, outcome))
