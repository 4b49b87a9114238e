"""The live page: what it shows, to whom it answers, and that it changes nothing."""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from device_agents.api import Vitals
from device_agents.errors import InfrastructureError
from device_agents.leases import audit, protocol
from device_agents.leases.ledger import Journal, Ledger
from device_agents.leases.model import Request
from harness.dash.gathering import Gatherer, LocalJournal
from harness.dash.metrics import FarmCollector
from harness.dash.server import Address, Dash, PublicInterface, Remembered, listen, serve
from harness.inventory import DeviceEntry, Inventory
from harness.store import SqlStore, open_store
from reports import farm_page
from reports.farm_state import FarmState
from tests.harness.farm_sample import HOSTILE, RUN, make_journal, make_store
from tests.harness.test_timeline import check_trace_events
from tests.reports.sample import HOST, LOST, PHONE

KNOWN = Inventory({name: DeviceEntry(kind="host") for name in (HOST, PHONE, LOST)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("farm")
    make_journal(folder / "leases")
    make_store(folder / "results.db")
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[SqlStore]:
    with open_store(folder / "results.db") as opened:
        yield opened


@pytest.fixture(scope="module")
def state(folder: Path, store: SqlStore) -> FarmState:
    return Gatherer([LocalJournal(Journal(folder / "leases"), KNOWN)], store).state()


class Client:
    """Plain HTTP to the page, as any program might send it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self, path: str, method: str = "GET", host: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            asked = {"Host": host if host is not None else f"127.0.0.1:{self.port}", **headers}
            connection.request(method, path, headers=asked)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def client(folder: Path, store: SqlStore) -> Iterator[Client]:
    gatherer = Gatherer([LocalJournal(Journal(folder / "leases"), KNOWN)], store)
    entries = Remembered(lambda: tuple(audit.entries(folder / "leases")))
    with listen(Address(port=0)) as listener:
        address = Address(port=listener.getsockname()[1], names=("farm.example",))
        app = Dash(gatherer, store, FarmCollector(gatherer.state, store.outcomes, entries)).app(address)
        server = serve(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield Client(address.port)
        server.should_exit = True
        thread.join(30)


# -- what it shows ------------------------------------------------------------------------------------


def test_devices_are_told_with_lease_quarantine_line_and_history(state: FarmState) -> None:
    by_name = {device.name: device for device in state.devices}
    assert {name: device.state for name, device in by_name.items()} == {
        HOST: "leased",
        PHONE: "free",
        LOST: "quarantined",
    }
    lease, bad = by_name[HOST].lease, by_name[LOST].quarantine
    assert lease is not None
    assert (lease.holder, lease.run) == ("nightly@ci-3 pid 4711", RUN)
    assert abs(lease.since - state.at) < 60
    assert bad is not None
    assert bad.until is not None
    assert 840 < bad.until - state.at <= 900
    assert (by_name[PHONE].stopped, by_name[PHONE].results) == (1, 8)
    assert by_name[PHONE].simulated
    assert [each.devices for each in state.waiting] == [(HOST, LOST)]
    run = next(run for run in state.runs if run.run_id == RUN)
    assert (run.holders, run.last) == ((HOST,), f"{HOST} · hybrid · test_p03")


def test_whoever_looks_writes_nothing(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "leases").iterdir()}
    Gatherer([LocalJournal(Journal(folder / "leases"), KNOWN)], None).state()
    assert {path.name: path.read_bytes() for path in (folder / "leases").iterdir()} == before


class Agents:
    """A source whose devices tell vitals, and which may be silent."""

    name = "agents"

    def __init__(self, ledger: Ledger) -> None:
        self._local = LocalJournal(ledger, Inventory({"a": DeviceEntry(kind="host")}))
        self.asked = 0
        self.silent = False

    def observed(self) -> object:
        if self.silent:
            raise InfrastructureError("no answer")
        return self._local.observed()

    def vitals(self, host: str, device: str) -> Vitals:
        self.asked += 1
        return Vitals(at=5.0, battery_percent=50.0, temperatures_c={"battery": 31.0})


def test_a_device_on_lease_is_not_asked_how_it_is_and_its_last_answer_stays(tmp_path: Path) -> None:
    now, ledger = [0.0], Ledger(tmp_path)
    source = Agents(ledger)
    gatherer = Gatherer([source], None, clock=lambda: now[0])  # type: ignore[list-item]
    assert gatherer.state().devices[0].vitals is not None
    now[0] = 59.0
    gatherer.state()
    assert source.asked == 1  # nor more often than once a minute
    request = Request("1", "ann", "ann", ("a",))
    ledger.act(protocol.ask(request, ledger.rules, wait=False))
    now[0] = 300.0
    (device,) = gatherer.state().devices
    assert (device.state, device.vitals and device.vitals.at, source.asked) == ("leased", 5.0, 1)


def test_a_source_that_is_silent_is_said_and_hides_nothing_else(tmp_path: Path, store: SqlStore) -> None:
    source = Agents(Ledger(tmp_path))
    source.silent = True
    state = Gatherer([source], store).state()  # type: ignore[list-item]
    assert state.problems == ("agents: no answer",)
    assert "no answer" in farm_page.html(state)
    assert len(state.runs) == 2


def test_what_a_device_says_is_text_on_the_page(state: FarmState) -> None:
    made = farm_page.html(state)
    assert "<script>alert" not in made
    assert "&lt;script&gt;alert" in made
    assert made.count("<script>") == 1  # ours
    evil = dataclasses.replace(
        state.devices[0], name=HOSTILE, model=HOSTILE, os='"><img src=x onerror=alert(1)>'
    )
    parts = farm_page.sections(dataclasses.replace(state, devices=(evil,), problems=(HOSTILE,)))
    assert not any("<script" in part or "<img" in part for part in parts.values())


# -- to whom it answers -------------------------------------------------------------------------------


def test_every_answer_has_strict_headers_and_none_for_other_origins(client: Client) -> None:
    for path in ("/", "/api/state", "/metrics", "/runs/nope/", "/nowhere"):
        _, headers, _ = client.ask(path, Origin="https://evil.example")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert not [name for name in headers if name.startswith("access-control-")]
        assert "server" not in headers
    _, headers, page = client.ask("/")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert " style=" not in page  # which the policy would refuse


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_it_only_looks(client: Client, method: str) -> None:
    status, headers, _ = client.ask("/", method)
    assert (status, set(headers["allow"].split(", "))) == (405, {"GET", "HEAD"})
    assert client.ask("/", "HEAD")[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("[::1]:{port}", 200),
        ("farm.example", 200),  # said to be meant
        ("evil.example:{port}", 421),  # a name that its owner has pointed at 127.0.0.1
        ("127.0.0.1.evil.example:{port}", 421),
        ("localhost:{port}.evil.example", 421),
        ("127.0.0.1", 421),  # of another port
        ("192.0.2.7:{port}", 421),
        ("", 421),
    ],
)
def test_it_answers_to_its_own_names_only(client: Client, host: str, status: int) -> None:
    assert client.ask("/api/state", host=host.format(port=client.port))[0] == status


def test_it_is_not_open_to_the_network_unless_somebody_says_so() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.org"):
        with pytest.raises(PublicInterface, match=r"without a password.*--public"):
            listen(Address(host, 0))
    Address("0.0.0.0", 1, public=True).check()
    assert Address("0.0.0.0", 80, public=True).is_meant("192.0.2.7")
    assert not Address("0.0.0.0", 80, public=True).is_meant("evil.example")
    with listen(Address(port=0)) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


# -- what else it serves ------------------------------------------------------------------------------


def test_its_json_is_the_same_as_the_page_and_sections_fill_it(client: Client) -> None:
    found = json.loads(client.ask("/api/state")[2])
    assert [device["name"] for device in found["devices"]] == [LOST, HOST, PHONE]
    page = client.ask("/")[2]
    assert list(json.loads(client.ask("/api/sections")[2])) == list(farm_page.SECTIONS)
    assert all(f'<section id="{name}">' in page for name in farm_page.SECTIONS)


def test_a_run_is_linked_to_its_report_data_and_timeline(client: Client) -> None:
    assert f'href="runs/{RUN}/"' in client.ask("/")[2]
    status, _, report = client.ask(f"/runs/{RUN}/")
    assert status == 200
    assert "Content-Security-Policy" in report
    assert json.loads(client.ask(f"/runs/{RUN}/results.json")[2])["run_id"] == RUN
    assert client.ask(f"/runs/{RUN}/junit.xml")[2].startswith("<?xml")
    status, headers, made = client.ask(f"/runs/{RUN}/trace.json")
    assert headers["content-disposition"].startswith("attachment")
    check_trace_events(json.loads(made))
    status, _, said = client.ask("/runs/..%2f..%2fetc%2fpasswd/")
    assert status == 404
    assert "root:" not in said


def test_prometheus_reads_its_metrics(client: Client) -> None:
    status, headers, text = client.ask("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *sorted(v for k, v in sample.labels.items() if k != "host")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["kvfarm_devices", "leased"] == 1
    assert found["kvfarm_devices", "quarantined"] == 1
    assert found["kvfarm_requests_waiting",] == 1
    assert found["kvfarm_device_flake_ratio", PHONE] == 1 / 8
    assert found["kvfarm_check_results_total", HOST, "passed"] == 34
    assert found["kvfarm_infrastructure_failures_total", LOST] == 2
    assert found["kvfarm_lease_events_total", HOST, "leased"] == 1
    assert found["kvfarm_lease_wait_seconds_count",] == 1
    assert found["kvfarm_device_battery_ratio", PHONE] == 0.84
    assert found["kvfarm_device_temperature_celsius", "cpu", PHONE] == 45.0
