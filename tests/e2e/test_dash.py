"""``kvfarm dash`` as people start it, in a real browser: it renews itself and runs only its own script."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.browser import BROWSERS
from tests.harness.farm_sample import RUN, make_journal, make_store
from tests.reports.parsed import Page

DASH = "from harness.cli import main; main()"
DEADLINE_S = 120.0


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    make_journal(tmp_path / "leases")
    make_store(tmp_path / "results.db")
    command = [sys.executable, "-c", DASH, "dash", "--port=0", f"--store={tmp_path / 'results.db'}"]
    environment = {**os.environ, "KVFARM_LEASES": str(tmp_path / "leases")}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+/) until Ctrl-C", line)
        assert found, line
        yield found[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) in (0, 130)
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def test_the_live_page_renews_itself_and_runs_nothing_that_a_device_says(url: str, tmp_path: Path) -> None:
    found = [path for path in map(shutil.which, BROWSERS) if path]
    if not found:
        pytest.fail(f"sought one of {', '.join(BROWSERS)} on PATH, found none: apt-get install chromium")
    command = [found[0], "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'p'}"]
    command += ["--disable-dev-shm-usage", "--virtual-time-budget=7000", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    dom = Page(done.stdout.strip())
    attributes = dom.one("html").attributes
    assert attributes.get("data-errors", "") == ""  # the policy blocked nothing, and nothing failed
    assert int(attributes["data-renewals"]) >= 2
    assert len(dom.all("script")) == 1
    assert dom.one("button", id="pause").attributes.get("aria-pressed") == "false"
    assert [link for link in dom.all("a") if link.attributes.get("href") == f"runs/{RUN}/"]
