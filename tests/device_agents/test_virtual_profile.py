"""Profiles of virtual phones, and the answers that follow from them."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace

import pytest

from device_agents.adb.facts import mem_total
from device_agents.recording.answers import parse_gauge, parse_vitals
from device_agents.virtual.errors import VirtualPhoneUnavailable
from device_agents.virtual.physics import Physics
from device_agents.virtual.procfs import cpuinfo_arm, cpuinfo_x86, meminfo
from device_agents.virtual.profile import FOLDER, Battery, Profile, load_profile, parse_abi, profile_names
from device_agents.virtual.properties import DENIED, sysfs
from device_agents.virtual.services import AndroidServices

PIXEL, GALAXY, STOPPED = "pixel-8", "galaxy-s24", "honor-stopped"


class Phone:
    """Services on a clock that the test sets."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.physics = Physics(profile, 0.0)
        self.services = AndroidServices(profile, profile.abi, "VP1", self.physics)

    def __call__(self, line: str) -> str:
        answer = self.services.call(line.split())
        assert answer.code == 0, answer
        return answer.text

    def refused(self, line: str) -> str:
        answer = self.services.call(line.split())
        assert answer.code != 0
        assert answer.error
        return answer.text

    def battery(self) -> dict[str, str]:
        lines = self("dumpsys battery").splitlines()
        return dict(line.strip().split(": ", 1) for line in lines if ": " in line)


def phone(name: str, **battery: object) -> Phone:
    profile = load_profile(name)
    return Phone(replace(profile, battery=replace(profile.battery, **battery)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_is_whole_and_says_where_its_quirks_were_seen(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.fingerprint.startswith(f"{profile.brand}/")
    assert f":{profile.android}/{profile.build_id}/" in profile.fingerprint
    assert profile.quirks
    for quirk in profile.quirks:
        assert len(quirk.source) > 15, quirk
    for cluster in profile.clusters:
        assert cluster.min_khz < cluster.fixed_khz <= cluster.max_khz
    assert list(profile.thermal.throttle_c) == sorted(profile.thermal.throttle_c)
    assert len(profile.thermal.throttle_c) == 6


def test_the_quirks_of_at_least_12_profiles_were_all_seen_somewhere() -> None:
    assert len([name for name in profile_names() if all(q.seen for q in load_profile(name).quirks)]) >= 12


def test_no_source_is_a_guess() -> None:
    for name in profile_names():
        for quirk in load_profile(name).quirks:
            if quirk.seen:
                assert not re.search("assumed|not looked up|plausible", quirk.source), (name, quirk)


HOST_MEMORY = "MemTotal:       24684092 kB\nMemFree:  1 kB\nMemAvailable:   {} kB\n"


def available(text: str) -> int:
    """kB."""
    found = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_memory_is_the_profiles_less_what_its_processes_hold() -> None:
    profile = load_profile("pixel-8")
    told = meminfo(profile, 100 << 20, HOST_MEMORY.format(20_000_000))
    assert mem_total(told) == profile.ram_mib << 20
    assert available(told) == (profile.ram_mib - 100) * 1024
    # No phone has more left than the machine that it runs on.
    assert available(meminfo(profile, 0, HOST_MEMORY.format(123456))) == 123456
    assert available(meminfo(profile, 99 << 30, HOST_MEMORY.format(20_000_000))) == 0
    assert len({len(meminfo(profile, held, HOST_MEMORY.format(9))) for held in (0, 1 << 20, 1 << 40)}) == 1


def test_an_x86_phone_has_the_processors_of_its_profile_with_the_flags_of_this_machine() -> None:
    host = "processor\t: 0\nmodel name\t: Some CPU\nsiblings\t: 2\nflags\t\t: fpu avx2\n\nprocessor\t: 1\n\n"
    told = cpuinfo_x86(load_profile("pixel-8"), host)
    assert re.findall(r"^processor\t: (\d+)$", told, re.MULTILINE) == [str(n) for n in range(9)]
    assert told.count("flags\t\t: fpu avx2\n") == told.count("siblings\t: 9\n") == 9
    assert "Some CPU" not in told


def test_an_unknown_profile_lists_those_there_are() -> None:
    with pytest.raises(VirtualPhoneUnavailable, match=r"'nokia-3310'; there are .*pixel-8"):
        load_profile("nokia-3310")


def test_a_misspelt_profile_is_refused_with_the_path_to_it(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("profiles")
    text = (FOLDER / f"{PIXEL}.toml").read_text()
    (folder / "bad.toml").write_text(text.replace("full_uah", "full_mah"))
    monkeypatch.setattr("device_agents.virtual.profile.FOLDER", folder)
    with pytest.raises(VirtualPhoneUnavailable, match=r"bad\.toml.*full_mah"):
        load_profile("bad")


def test_an_abi_is_one_of_two() -> None:
    assert parse_abi("arm64-v8a") == "arm64-v8a"
    with pytest.raises(VirtualPhoneUnavailable, match="'mips'; there are x86_64, arm64-v8a"):
        parse_abi("mips")


def test_getprop_answers_from_the_profile_and_says_that_it_is_virtual() -> None:
    pixel = phone(PIXEL)
    assert pixel("getprop ro.product.model") == "Pixel 8\n"
    assert pixel("getprop ro.product.cpu.abi") == "arm64-v8a\n"
    assert pixel("getprop ro.kvfarm.virtual") == "1\n"
    assert pixel("getprop no.such.property") == "\n"
    assert pixel("getprop no.such.property other") == "other\n"
    assert f"[ro.build.fingerprint]: [{pixel.profile.fingerprint}]\n" in pixel("getprop")


def test_setprop_takes_what_the_shell_user_may_set() -> None:
    pixel = phone(PIXEL)
    pixel("setprop debug.kvfarm 7")
    assert pixel("getprop debug.kvfarm") == "7\n"
    assert "failed to set" in pixel.refused("setprop ro.product.model Other")
    assert pixel("getprop ro.product.model") == "Pixel 8\n"


def test_settings_are_kept() -> None:
    pixel = phone(PIXEL)
    assert pixel("settings get global no_such") == "null\n"
    pixel("settings put system screen_brightness 17")
    assert pixel("cmd settings get system screen_brightness") == "17\n"
    assert pixel("settings delete system screen_brightness") == "Deleted 1 rows\n"
    assert pixel("settings get system screen_brightness") == "null\n"
    pixel("svc power stayon usb")
    assert pixel("settings get global stay_on_while_plugged_in") == "2\n"
    pixel("cmd connectivity airplane-mode enable")
    assert pixel("cmd connectivity airplane-mode") == "enabled\n"
    pixel.refused("settings get nowhere key")


def test_what_android_does_not_know_it_says() -> None:
    pixel = phone(PIXEL)
    assert pixel("dumpsys nothing") == "Can't find service: nothing\n"
    assert "Can't find service" in pixel.refused("cmd nothing")
    assert pixel("cmd battery get nothing") == "Unknown get option: nothing\n"


def test_microamps_and_milliamps_are_the_same_current() -> None:
    for name, expected in ((PIXEL, -0.55 / 3.912), (GALAXY, 0.62 / 3.887)):
        told = float(phone(name)("cmd battery get -f current_now"))
        scale = {PIXEL: 1e6, GALAXY: 1e3}[name]
        assert told / scale == pytest.approx(expected, rel=0.01)


def test_unplug_freezes_everything_but_the_current_until_reset() -> None:
    pixel = phone(PIXEL, plugged="usb", counter_tick_uah=1)
    assert pixel.battery()["USB powered"] == "true"
    pixel("dumpsys battery unplug")
    assert "(UPDATES STOPPED -- use 'reset' to restart)" in pixel("dumpsys battery")
    frozen = pixel.battery()
    assert frozen["USB powered"] == "false"
    pixel.physics.advance(3600.0, 3600.0)
    assert pixel.battery() == frozen
    assert float(pixel("cmd battery get current_now")) > 0  # it still charges
    pixel("dumpsys battery reset")
    thawed = pixel.battery()
    assert thawed["USB powered"] == "true"
    assert thawed["temperature"] != frozen["temperature"]


def test_a_profile_can_come_with_updates_stopped() -> None:
    stopped = phone(STOPPED)
    assert "UPDATES STOPPED" in stopped("dumpsys battery")
    assert stopped.battery()["USB powered"] == "false"
    stopped("cmd battery reset")
    assert "UPDATES STOPPED" not in stopped("dumpsys battery")
    assert stopped.battery()["USB powered"] == "true"


def test_set_stops_updates_and_bad_values_do_not() -> None:
    pixel = phone(PIXEL)
    assert "Bad value" in pixel.services.call(["dumpsys", "battery", "set", "level", "x"]).text
    assert "UPDATES STOPPED" not in pixel("dumpsys battery")
    pixel("dumpsys battery set level 5")
    assert pixel.battery()["level"] == "5"
    assert "SecurityException" in pixel.refused("dumpsys battery suspend_input")


def test_thermalservice_has_stale_and_current_temperatures() -> None:
    pixel = phone(PIXEL)
    pixel.physics.advance(600.0, 2400.0)
    dump = pixel("dumpsys thermalservice")
    cached, _, current = dump.partition("Current temperatures from HAL:\n")
    pattern = r"\tTemperature\{mValue=([\d.]+), mType=3, mName=VIRTUAL-SKIN, mStatus=(\d)\}\n"
    then, now = re.search(pattern, cached), re.search(pattern, current)
    assert then is not None
    assert now is not None
    assert float(now[1]) > float(then[1]) + 5
    assert "mHotThrottlingThresholds=[NaN, 39.0, " in dump


def test_without_a_thermal_hal_there_are_no_temperatures() -> None:
    dump = phone(STOPPED)("dumpsys thermalservice")
    assert dump.endswith("Cached temperatures:\nHAL Ready: false\n")
    assert "Temperature{" not in dump


def test_status_follows_the_skin_and_can_be_overridden() -> None:
    pixel = phone(PIXEL, core_w=6.0)
    assert "Thermal Status: 0\n" in pixel("dumpsys thermalservice")
    pixel.physics.advance(3600.0, 3600.0)
    assert pixel.physics.celsius["skin"] == pytest.approx(22 + 3.2 * 6.55, abs=0.1)
    assert "Thermal Status: 1\n" in pixel("dumpsys thermalservice")  # 39.0 to 43.0 °C
    pixel("cmd thermalservice override-status 4")
    assert "IsStatusOverride: true\n" in pixel("dumpsys thermalservice")
    assert "Thermal Status: 4\n" in pixel("dumpsys thermalservice")
    pixel("cmd thermalservice reset")
    assert "Thermal Status: 1\n" in pixel("dumpsys thermalservice")


def files(p: Phone) -> dict[str, tuple[str, int]]:
    fixed = p.services.fixed_performance
    return {path: (text, mode) for path, text, mode in sysfs(p.profile, p.physics, fixed)}


def test_fixed_performance_shows_in_the_clocks() -> None:
    pixel = phone(PIXEL)
    path = "devices/system/cpu/cpu8/cpufreq/scaling_max_freq"
    assert files(pixel)[path][0] == "2914000\n"
    pixel("cmd power set-fixed-performance-mode-enabled true")
    assert files(pixel)[path][0] == "2049000\n"
    pixel("cmd power set-fixed-performance-mode-enabled false")
    assert files(pixel)[path][0] == "2914000\n"


def test_sysfs_has_every_core_in_its_cluster_and_hides_the_battery() -> None:
    galaxy = files(phone(GALAXY))
    assert galaxy["devices/system/cpu/possible"][0] == "0-9\n"
    assert galaxy["devices/system/cpu/cpu6/topology/core_siblings_list"][0] == "4-6\n"
    assert galaxy["devices/system/cpu/cpufreq/policy9/related_cpus"][0] == "9\n"
    assert galaxy["class/power_supply/battery/current_now"][1] == DENIED
    assert files(phone(GALAXY, sysfs="readable"))["class/power_supply/battery/current_now"][1] == 0o444


def test_two_zones_can_have_the_same_type() -> None:
    zones = files(phone(STOPPED))
    assert zones["class/thermal/thermal_zone2/type"][0] == "battery\n"
    assert zones["class/thermal/thermal_zone3/type"][0] == "battery\n"


def test_cpuinfo_is_that_of_an_arm_kernel() -> None:
    text = cpuinfo_arm(load_profile(PIXEL))
    assert re.findall(r"processor\t: (\d+)", text) == [str(n) for n in range(9)]
    assert re.findall(r"CPU part\t: (\w+)", text) == ["0xd46"] * 4 + ["0xd4d"] * 4 + ["0xd4e"]
    assert "model name" not in text


def test_energy_is_power_at_rest_and_of_the_busy_cores() -> None:
    pixel = phone(PIXEL)
    for second in range(1, 101):
        pixel.physics.advance(float(second), second * 2.0)  # two busy cores
    truth = pixel.physics.truth
    assert truth.energy_j == pytest.approx(100 * (0.55 + 2 * 1.1))
    assert truth.cpu_s == 200
    assert truth.idle_j == pytest.approx(55)
    drained = 4_485_000 * 0.72 - truth.charge_uah
    sag = 2.75 / 3.912 * 0.12  # V
    assert drained * (3.912 - sag) * 3.6e-3 == pytest.approx(truth.energy_j, rel=2e-3)  # µAh, V: J


def test_the_voltage_sags_under_load_and_with_charge() -> None:
    pixel = phone(PIXEL)
    assert pixel.battery()["voltage"] == str(pixel.physics.voltage_mv)
    rest = pixel.physics.voltage_mv
    pixel.physics.advance(1.0, 4.0)
    loaded = pixel.physics.voltage_mv
    amperes = (0.55 + 4.4) / loaded * 1000
    assert loaded == pytest.approx(3912 - 120 * amperes, abs=1)
    assert loaded < rest - 100


def test_a_hot_phone_clocks_down_and_takes_less() -> None:
    pixel = phone(PIXEL, core_w=8.0)
    full = files(pixel)["devices/system/cpu/cpu8/cpufreq/scaling_cur_freq"][0]
    for minute in range(1, 61):
        pixel.physics.advance(minute * 60.0, minute * 60.0)
    assert pixel.physics.thermal_status == 2
    share = pixel.physics.clock_share
    assert share == pytest.approx(0.88)
    told = files(pixel)["devices/system/cpu/cpu8/cpufreq/scaling_cur_freq"][0]
    assert int(told) == round(int(full) * share)
    before = pixel.physics.truth
    pixel.physics.advance(3601.0, 3601.0)
    assert pixel.physics.truth.energy_j - before.energy_j == pytest.approx(0.55 + 8.0 * share**2)


def test_time_that_stands_still_or_runs_back_changes_nothing() -> None:
    pixel = phone(PIXEL)
    pixel.physics.advance(10.0, 1.0)
    before = pixel.physics.truth
    pixel.physics.advance(10.0, 9.0)
    pixel.physics.advance(5.0, 9.0)
    assert pixel.physics.truth == before


def test_a_charger_fills_the_battery_to_full_and_no_further() -> None:
    pixel = phone(PIXEL, plugged="ac")
    assert pixel.battery()["status"] == "2"
    pixel.physics.advance(36_000.0, 0.0)
    assert pixel.battery()["level"] == "100"
    assert pixel.battery()["status"] == "5"


def test_an_empty_battery_stays_empty() -> None:
    pixel = phone(PIXEL)
    pixel.physics.advance(1e7, 1e7)
    assert pixel.battery()["Charge counter"] == "0"


def test_the_charge_counter_may_be_coarse_or_stuck() -> None:
    galaxy = phone(GALAXY)
    assert int(galaxy.battery()["Charge counter"]) % 40_000 == 0
    stuck = phone(GALAXY, counter_stuck_uah=1)
    stuck.physics.advance(1000.0, 0.0)
    assert stuck.battery()["Charge counter"] == "1"


def test_current_now_is_the_mean_since_it_last_changed() -> None:
    pixel = phone(PIXEL, refresh_s=2.0, noise=0.0, resistance_ohm=0.0)
    first = pixel.physics.current_now
    pixel.physics.advance(1.0, 1.0)
    assert pixel.physics.current_now == first  # not yet
    pixel.physics.advance(2.0, 1.0)
    mean_w = 0.55 + 1.1 / 2
    assert pixel.physics.current_now == pytest.approx(-mean_w / 3.912 * 1e6, rel=1e-4)


def test_the_battery_has_no_field_that_nothing_reads() -> None:
    source = "".join((FOLDER.parent / f"{m}.py").read_text() for m in ("physics", "services", "properties"))
    unread = [f.name for f in dataclasses.fields(Battery) if f".{f.name}" not in source]
    assert unread == []


def answers(p: Phone) -> dict[str, str]:
    """To the questions of device_agents.recording, as this phone's shell user gets them."""
    told = {path: text.strip() for path, (text, mode) in files(p).items() if mode != DENIED}
    zones = [f"class/thermal/thermal_zone{i}" for i in range(len(p.profile.thermal.zones))]
    clocks = [f"devices/system/cpu/cpu{i}/cpufreq" for i in range(p.profile.cores)]
    return {
        "battery": p("dumpsys battery"),
        "thermal": p("dumpsys thermalservice"),
        "zones": "\n".join(f"{told[f'{z}/temp']} {told[f'{z}/type']}" for z in zones if f"{z}/temp" in told),
        "clocks": "\n".join(
            f"{i}/cpufreq {told[f'{c}/scaling_cur_freq']} {told[f'{c}/scaling_governor']}"
            for i, c in enumerate(clocks)
        ),
    }


@pytest.mark.parametrize("number_format", ["plain", "german", "arabic"])
@pytest.mark.parametrize("cut_dumps", [0, 1, 2])
@pytest.mark.parametrize("name", profile_names())
def test_vitals_of_every_profile_are_right_or_none(name: str, cut_dumps: int, number_format: str) -> None:
    profile = replace(load_profile(name), cut_dumps=cut_dumps, number_format=number_format)  # type: ignore[arg-type]
    made = Phone(profile)
    stopped = profile.battery.updates_stopped
    for second in range(1, 60):
        made.physics.advance(second * 1.0, second * 3.0)
        truth = made.physics.celsius
        asked = answers(made)
        vitals, gauge = parse_vitals(asked, 0.0), parse_gauge(asked["battery"])
        # What a sensor that follows nothing says is what it says: whether it stands still, time tells.
        still = {zone.celsius for zone in profile.thermal.zones if zone.celsius}
        still |= {sensor.celsius for sensor in profile.thermal.sensors if sensor.celsius}
        for what, celsius in vitals.temperatures_c.items():
            assert min(abs(celsius - true) for true in (*truth.values(), *still)) < 0.11, (what, celsius)
        assert vitals.battery_percent in (None, made.physics.level_percent)
        assert vitals.battery_charging in (None, made.physics.charging)
        assert gauge.voltage_v is None or abs(gauge.voltage_v * 1000 - made.physics.voltage_mv) < 200
        assert (
            gauge.counter_uah is None or stopped or abs(gauge.counter_uah - made.physics.counter_uah) < 9000
        )
        assert gauge.plugged in (None, profile.battery.plugged != "none")
        assert vitals.thermal_status in (None, made.services.thermal_status)
        assert len(vitals.clocks_khz) == profile.cores
    if stopped and not cut_dumps:
        assert (vitals.battery_percent, gauge.plugged, gauge.voltage_v) == (None, None, None)


def test_the_parser_would_notice_a_profile_that_lies_more() -> None:
    """The test above can fail: with tenths taken for granted a battery at 27 °C is at 2.7 °C."""
    degrees = phone("fire-hd-8")
    assert parse_gauge(degrees("dumpsys battery")).celsius is None
    assert re.search(r"temperature: 2\d$", degrees("dumpsys battery"), re.MULTILINE)
