"""A run takes no leg on a phone that is hot: it waits, and one that stays hot is set aside, unmeasured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from device_agents.api import DeviceIdentity, Vitals
from harness.errors import NotFit, Quarantined
from harness.run import DeviceRun
from harness.run_options import RunOptions
from harness.store import open_store


class HotFarm:
    """Gives leases and vitals, and says who the device is."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.waited_s = 0.0

    def lease(self, name: str) -> None:
        self.asked.append("lease")

    def vitals(self, name: str) -> Vitals:
        self.asked.append("vitals")
        return Vitals(at=0.0, temperatures_c={"battery": 45.0})

    def identity(self, name: str) -> DeviceIdentity:
        return DeviceIdentity(
            name, "android", "Pixel 8", "", "arm64-v8a", "Android 16", "b", 8, 1 << 33, (), {}
        )

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path) -> Any:
    farm = tmp_path / "farm.toml"
    farm.write_text(
        '[devices.pixel]\nkind = "android"\noptions = { serial = "A1" }\n[entry]\nwait_s = 0.01\n'
    )
    options = RunOptions(
        "pixel", tmp_path / "tiny", "hybrid", str(tmp_path / "r.db"), farm=farm, cache=tmp_path / "cache"
    )
    made = DeviceRun(options, lambda *_: None, lambda _: None)
    made._farm = HotFarm()  # type: ignore[assignment]
    made.begin(0, 2)
    yield made
    made.close()


def test_a_leg_is_not_taken_on_a_hot_phone_and_the_report_has_the_reason(run: DeviceRun) -> None:
    recipe = run.recipes["hybrid"]
    with pytest.raises(NotFit, match=r"the battery has 45.0 °C, over 37.0 °C"):
        run.measure("pixel", run.options.model, recipe)
    with pytest.raises(Quarantined, match="was not fit to start"):
        run.measure("pixel", run.options.model, recipe)
    assert run.farm.asked == ["lease", "vitals", "vitals"]  # type: ignore[attr-defined]
    assert run.take_waited() > 0
    run.close()
    with open_store(run.options.store) as store:
        results = store.results(run.run_id)
    assert results.legs == ()
    (device,) = results.devices
    assert "the battery has 45.0 °C" in device.quarantined
    assert any("pixel was quarantined: pixel was not fit to start" in e for e in results.infrastructure)
