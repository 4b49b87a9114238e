"""The share of the bandwidth ceiling: a number only where everything in it was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reports import ceiling
from reports.page import html
from reports.results import BandwidthInfo, StepReads
from tests.reports.parsed import Page
from tests.reports.sample import AFTER, HOST, PHONE, leg, run, samples

READS = StepReads(weights=600_000_000, kv=20_000_000)
SPEED = BandwidthInfo(31e9, 256 << 20, 2, 32 << 20)


def test_the_share_is_bytes_a_token_times_tokens_a_second_over_bandwidth() -> None:
    found = ceiling.share(READS, 40.0, SPEED)
    assert found.value == pytest.approx(620e6 * 40 / 31e9)
    assert found.words == "80 %"
    assert found.detail == "of 31.0 GB/s"
    assert ceiling.reads_line(READS) == "591 MiB a token, 19.1 MiB of them cache"


@pytest.mark.parametrize(
    ("reads", "rate", "speed"), [(None, 40.0, SPEED), (READS, None, SPEED), (READS, 40.0, None)]
)
def test_what_was_not_measured_is_no_number(
    reads: StepReads | None, rate: float | None, speed: BandwidthInfo | None
) -> None:
    assert ceiling.share(reads, rate, speed) == ceiling.NOT_MEASURED


def test_a_model_that_fits_into_the_cache_has_no_share() -> None:
    found = ceiling.share(StepReads(1 << 20, 1 << 10), 4000.0, SPEED)
    assert (found.value, found.words) == (None, "fits the cache")


def test_the_best_measurement_of_a_device_counts_for_all_its_legs() -> None:
    legs = [
        leg(HOST, bandwidth=replace(SPEED, bytes_per_s=20e9)),
        leg(HOST, bandwidth=SPEED),
        leg(HOST),
        leg(PHONE),
    ]
    assert ceiling.bandwidths(legs) == {HOST: SPEED}


def test_the_table_of_measurements_shows_it() -> None:
    rate = 1000 / 25.0
    legs = (
        leg(HOST, AFTER, samples=samples(700.0, 25.0), reads=READS),
        leg(HOST, "second", samples=samples(700.0, 25.0), reads=READS, bandwidth=SPEED),
        leg(PHONE, AFTER, reads=READS),
    )
    page = Page(html(run(legs=legs, planned_legs=3)))
    assert [e.words for e in page.all("th", scope="col")].count("Of bandwidth") == 2  # one table a device
    said = [e.words for e in page.all("span", class_="value") if "%" in e.words or "measured" in e.words]
    assert said[-1] == "not measured"
    shares = [int(words.split()[0]) for words in said[:-1]]
    assert len(shares) == 2
    assert shares == pytest.approx([100 * 620e6 * rate / 31e9] * 2, rel=0.05)
