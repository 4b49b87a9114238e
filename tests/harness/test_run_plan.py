"""What a run never meant to do stands in its header, with the reason; and how its failures are replayed."""

from __future__ import annotations

from pathlib import Path

from harness.run import DeviceRun
from harness.run_options import RunOptions


def test_recipes_that_are_not_for_a_device_are_not_planned(tmp_path: Path) -> None:
    farm = tmp_path / "farm.toml"
    farm.write_text('[devices.old]\nrecipes = ["hybrid*"]\n[devices.new]\n')
    options = RunOptions(
        devices="old,new",
        model=tmp_path / "tiny",
        recipes="naive,hybrid",
        store=str(tmp_path / "r.db"),
        farm=farm,
        measure=((tmp_path / "big", "int4", ("new",)),),
    )
    run = DeviceRun(options, lambda *_: None, lambda _: None)
    assert [(each.device, each.recipe, each.reason) for each in run.header().not_planned] == [
        ("old", "naive", "farm.toml: old is for recipes hybrid*"),
        ("old", "int4", "not measured here (--measure)"),
        ("new", "int4", "measured, not checked (--measure)"),
    ]


def test_a_failure_is_replayed_on_the_same_farm(tmp_path: Path) -> None:
    farm = tmp_path / "lab" / "farm.toml"
    farm.parent.mkdir()
    farm.write_text("[devices.old]\n")
    options = RunOptions(
        devices="old",
        model=Path("tiny"),
        recipes="hybrid",
        store=str(tmp_path / "r.db"),
        farm=farm,
        farm_address="127.0.0.1:6379",
    )
    run = DeviceRun(options, lambda *_: None, lambda _: None)
    assert run.replay_command("old", "hybrid", "{}") == (
        "kvfarm replay '{}' --devices old --model tiny --recipe hybrid "
        f"--farm {farm} --farm-address 127.0.0.1:6379"
    )
