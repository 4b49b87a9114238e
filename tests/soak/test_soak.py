"""The soak's short form: every fault once, against phones at work. ``make soak`` is the long one."""

from __future__ import annotations

from device_agents.bundle import build
from device_agents.virtual.rootfs import native_abi
from harness.recipes import parse_recipe
from tests.conftest import ExportTiny
from tests.e2e.test_android_device import BUNDLES
from tests.soak.faults import Scale, faults
from tests.soak.soak import run_soak


def test_every_fault_once_loses_nothing_and_leaves_nothing(export_tiny: ExportTiny) -> None:
    bundle = build(native_abi(), BUNDLES)
    report = run_soak(bundle, export_tiny(parse_recipe("hybrid").export), times=1, seed=1, within_s=300)
    assert not report.wrong, report.table() + "\n" + "\n".join(report.wrong)
    assert {each.fault for each in report.rounds} == {fault.name for fault in faults(Scale())}
