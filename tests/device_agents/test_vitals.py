"""Vitals and probe: what Linux and Android tell, from trees of files; None for what they do not."""

from __future__ import annotations

import os
from pathlib import Path

from device_agents.probe import probe
from device_agents.vitals import read_vitals


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


PHONE = {
    "proc/loadavg": "1.25 0.50 0.40 2/900 12345\n",
    "proc/stat": "cpu  100 20 30 5000 40 5 6 7 8 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n",
    "proc/meminfo": "MemTotal:        7900000 kB\nMemFree:  100 kB\nMemAvailable:    4000000 kB\n",
    **{f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_cur_freq": f"{1000 + i}\n" for i in range(12)},
    **{f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_governor": "sched_pixel\n" for i in range(12)},
    "sys/devices/system/cpu/cpufreq/x": "",
    "sys/class/thermal/thermal_zone0/type": "BIG\n",
    "sys/class/thermal/thermal_zone0/temp": "41500\n",
    "sys/class/thermal/thermal_zone1/type": "skin\n",
    "sys/class/thermal/thermal_zone1/temp": "-5000\n",
    "sys/class/thermal/thermal_zone2/type": "BIG\n",
    "sys/class/thermal/thermal_zone2/temp": "42000\n",
    "sys/class/thermal/cooling_device0/type": "fan\n",
    "sys/class/power_supply/usb/type": "USB\n",
    "sys/class/power_supply/battery/type": "Battery\n",
    "sys/class/power_supply/battery/capacity": "77\n",
    "sys/class/power_supply/battery/status": "Discharging\n",
}


def test_a_phone_that_tells_everything(tmp_path: Path) -> None:
    vitals = read_vitals(tree(tmp_path, PHONE), now=1000.0)
    assert vitals.at == 1000.0
    assert vitals.load_1m == 1.25
    assert vitals.busy_s == (100 + 20 + 30 + 5 + 6 + 7) / os.sysconf("SC_CLK_TCK")  # neither idle nor iowait
    assert vitals.mem_available_bytes == 4_000_000 * 1024
    assert vitals.clocks_khz == tuple(range(1000, 1012))  # cpu10 after cpu9
    assert vitals.governor == "sched_pixel"
    assert vitals.temperatures_c == {"BIG": 41.5, "skin": -5.0, "BIG#2": 42.0}
    assert vitals.battery_percent == 77.0
    assert vitals.battery_charging is False
    assert vitals.thermal_status is None


def test_a_device_that_tells_nothing_is_all_none(tmp_path: Path) -> None:
    vitals = read_vitals(tmp_path, now=1.0)
    assert vitals.load_1m is None
    assert vitals.busy_s is None
    assert vitals.mem_available_bytes is None
    assert vitals.governor is None
    assert vitals.battery_percent is None
    assert vitals.battery_charging is None
    assert vitals.clocks_khz == ()
    assert vitals.temperatures_c == {}


def test_nonsense_is_none_not_an_error(tmp_path: Path) -> None:
    nonsense = dict.fromkeys(PHONE, "ÿ n/a \x00")
    vitals = read_vitals(tree(tmp_path, nonsense), now=1.0)
    assert vitals.load_1m is None
    assert vitals.busy_s is None
    assert vitals.clocks_khz == ()
    assert vitals.temperatures_c == {}
    assert vitals.battery_percent is None


def test_thermal_zones_that_are_not_wired_are_left_out(tmp_path: Path) -> None:
    files = {
        "sys/class/thermal/thermal_zone0/type": "unwired",
        "sys/class/thermal/thermal_zone0/temp": "-274000",
        "sys/class/thermal/thermal_zone1/type": "filler",
        "sys/class/thermal/thermal_zone1/temp": "2147483647",
        "sys/class/thermal/thermal_zone2/temp": "30000",
    }
    assert read_vitals(tree(tmp_path, files)).temperatures_c == {"thermal_zone2": 30.0}


def test_clusters_with_different_governors_are_both_named(tmp_path: Path) -> None:
    files = {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
        "sys/devices/system/cpu/cpu4/cpufreq/scaling_governor": "performance",
    }
    assert read_vitals(tree(tmp_path, files)).governor == "performance+schedutil"


def test_a_mouse_is_not_the_devices_battery(tmp_path: Path) -> None:
    files = {
        "sys/class/power_supply/a_mouse/type": "Battery",
        "sys/class/power_supply/a_mouse/scope": "Device",
        "sys/class/power_supply/a_mouse/capacity": "3",
        "sys/class/power_supply/b_main/type": "Battery",
        "sys/class/power_supply/b_main/capacity": "90",
        "sys/class/power_supply/b_main/status": "Charging",
    }
    vitals = read_vitals(tree(tmp_path, files))
    assert (vitals.battery_percent, vitals.battery_charging) == (90.0, True)


def test_this_machine_tells_its_memory_and_load() -> None:
    vitals = read_vitals()
    assert vitals.load_1m is not None
    assert vitals.mem_available_bytes is not None
    assert vitals.at > 1.7e9


def test_probe_reads_names_where_they_are(tmp_path: Path) -> None:
    files = {
        "sys/class/dmi/id/product_name": "Bench Machine\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor\t: 1\n",
        "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
    }
    found = probe(tree(tmp_path, files))
    assert (found.model, found.soc) == ("Bench Machine", "Some CPU @ 2 GHz")
    assert found.os == "Debian GNU/Linux 12 (bookworm)"


def test_probe_of_an_arm_board(tmp_path: Path) -> None:
    files = {
        "proc/device-tree/model": "Board Model B\0",
        "proc/cpuinfo": "processor\t: 0\nBogoMIPS: 1\n\nHardware\t: BCM2711\n",
    }
    found = probe(tree(tmp_path, files))
    assert (found.model, found.soc) == ("Board Model B", "BCM2711")


def test_probe_leaves_empty_what_is_not_told(tmp_path: Path) -> None:
    found = probe(tmp_path)
    assert (found.model, found.soc) == ("", "")
    identity = found.identity("bench", "host")
    assert (identity.name, identity.kind, identity.simulated) == ("bench", "host", "")
    assert identity.runtime["onnxruntime"]
