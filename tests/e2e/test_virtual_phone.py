"""Virtual phones for real: namespaces, Debian's adbd, an adb server of our own. Nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from device_agents.adb.connection import AdbServer
from device_agents.adb.facts import read_facts
from device_agents.adb.transport import AdbTransport
from device_agents.deadline import Deadline
from device_agents.virtual import (
    VirtualPhone,
    VirtualPhoneFailed,
    VirtualPhoneUnavailable,
    load_profile,
)
from device_agents.virtual.adb import PrivateAdbServer
from tests.device_agents.virtual_support import (
    ROOT,
    Adb,
    MakePhone,
    alive,
    connect,
    listening,
    run_child,
    tree,
    wait_for,
)
from tests.e2e.phones import cache, phone, server

__all__ = ["cache", "phone", "server"]  # fixtures


def test_the_shell_is_an_unprivileged_user_of_an_android(phone: MakePhone, server: PrivateAdbServer) -> None:
    adb = connect(server, phone())
    assert adb("id").startswith("uid=2000(shell) gid=2000(shell)")
    assert "CapEff:\t0000000000000000" in adb("cat /proc/self/status")
    assert adb("echo $ANDROID_ROOT $TMPDIR $KV_EMU") == "/system /data/local/tmp\n"
    assert adb("ls -d /lib /lib64 /usr /dev/shm 2>/dev/null; true") == ""
    for path in ("/system/x", "/x", "/apex/x", "/sys/x", "/data/x"):
        refused = adb.run(f"touch {path}")
        assert refused.returncode != 0, path
    adb("echo 1 > /data/local/tmp/x")
    assert adb("cat /data/local/tmp/x") == "1\n"
    assert adb.run("echo out; echo err >&2; exit 7").returncode == 7
    assert adb.run("[ -t 1 ] && echo terminal", "-tt").stdout == "terminal\n"


def test_the_phone_sees_itself_and_no_host(phone: MakePhone, server: PrivateAdbServer) -> None:
    adb = connect(server, phone())
    mounted = {line.split()[1] for line in adb("cat /proc/mounts").splitlines()}
    nodes = {f"/dev/{name}" for name in ("pts", "null", "zero", "urandom", "random", "tty")}
    proc = {"/proc/meminfo", "/proc/cpuinfo"}  # of the phone, not of this machine
    assert mounted == {"/", "/system", "/apex", "/data", "/proc", "/sys"} | nodes | proc
    processes = adb("ps -A -o PID,NAME").splitlines()[1:]
    assert 2 <= len(processes) < 12
    assert [line.split()[0] for line in adb("tail -n +3 /proc/net/dev").splitlines()] == ["lo:"]


def test_getprop_and_dumpsys_answer_from_the_profile(phone: MakePhone, server: PrivateAdbServer) -> None:
    adb = connect(server, phone("galaxy-s24"))
    assert adb("getprop ro.product.model") == "SM-S921B\n"
    assert adb("getprop ro.kvfarm.virtual") == "1\n"
    assert adb("getprop ro.product.cpu.abi") == "x86_64\n"
    assert "[ro.build.version.sdk]: [34]\n" in adb("getprop")
    assert "  level: 64\n" in adb("dumpsys battery")
    assert "mName=TYPE_SKIN" in adb("dumpsys thermalservice")
    assert int(adb("cmd battery get -f current_now")) > 0
    assert adb("cat /sys/devices/system/cpu/possible") == "0-9\n"
    denied = adb.run("cat /sys/class/power_supply/battery/current_now")
    assert denied.returncode == 1
    assert "Permission denied" in denied.stderr
    refused = adb.run("cmd nothing")
    assert (refused.returncode, refused.stdout) == (20, "")
    assert "Can't find service" in refused.stderr


def test_settings_keep_words_with_blanks_and_fixed_performance_reads_back(
    phone: MakePhone, server: PrivateAdbServer
) -> None:
    adb = connect(server, phone())
    adb("settings put global note 'two  words, a \\ and an ü'")
    assert adb("settings get global note") == "two  words, a \\ and an ü\n"
    clock = "cat /sys/devices/system/cpu/cpu8/cpufreq/scaling_max_freq"
    assert adb(clock) == "2914000\n"
    adb("cmd power set-fixed-performance-mode-enabled true")
    assert adb(clock) == "2049000\n"


def test_updates_stopped_until_reset(phone: MakePhone, server: PrivateAdbServer) -> None:
    adb = connect(server, phone("honor-stopped"))
    assert "UPDATES STOPPED" in adb("dumpsys battery")
    adb("dumpsys battery reset")
    assert "UPDATES STOPPED" not in adb("dumpsys battery")
    assert adb("cat /sys/class/thermal/thermal_zone3/type") == "battery\n"


def test_the_battery_pays_for_the_cpu_time_that_the_phone_uses(
    phone: MakePhone, server: PrivateAdbServer
) -> None:
    made = phone()
    adb = connect(server, made)
    before = made.truth()
    used = adb("i=0; while [ $i -lt 150000 ]; do i=$((i+1)); done; cat /proc/$$/stat").split()
    seconds = (int(used[13]) + int(used[14])) / os.sysconf("SC_CLK_TCK")
    after = made.truth()
    assert seconds > 0.2
    assert after.cpu_s - before.cpu_s == pytest.approx(seconds, abs=0.15)
    drained_j = (before.charge_uah - after.charge_uah) * 3.912 * 3.6e-3
    # Its voltage sags under load by what its inner resistance takes, 30 to 60 mV of 3.9 V.
    assert drained_j == pytest.approx(after.energy_j - before.energy_j, rel=0.03)
    assert drained_j > after.energy_j - before.energy_j
    assert after.energy_j - before.energy_j > 1.1 * seconds


def test_only_loopback_is_listened_on(phone: MakePhone, server: PrivateAdbServer) -> None:
    made = phone()
    connect(server, made)
    assert listening(tree(made.launcher_pid)) == {made.address}


def test_adbd_itself_runs_under_that_filter(phone: MakePhone, server: PrivateAdbServer) -> None:
    adb = connect(server, phone())
    assert "Seccomp:\t2" in adb("cat /proc/2/status")
    assert "adbd" in adb("cat /proc/2/cmdline")


def test_stop_leaves_no_process_port_mount_or_folder(phone: MakePhone, server: PrivateAdbServer) -> None:
    made = phone()
    adb = connect(server, made)
    adb("mkdir /data/local/tmp/locked; touch /data/local/tmp/locked/x; chmod 0 /data/local/tmp/locked")
    adb("setsid nohup sleep 300 >/dev/null 2>&1 </dev/null & sleep 0.1")
    processes, port = tree(made.launcher_pid), int(made.address.rpartition(":")[2])
    assert len(processes) >= 5
    in_time = Deadline(5)
    made.stop()
    assert not in_time.expired  # by itself, not by force
    assert not [pid for pid in processes if alive(pid)]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert str(made.folder) not in Path("/proc/mounts").read_text()
    assert not made.folder.exists()
    made.stop()
    with pytest.raises(VirtualPhoneFailed, match="does not run"):
        _ = made.address


def test_a_killed_parent_takes_its_phone_along_within_two_seconds(cache: Path, tmp_path: Path) -> None:
    with run_child(tmp_path / "phones", cache) as child:
        assert child.stdout is not None
        address, launcher = child.stdout.readline().split()
        processes = tree(int(launcher))
        assert len(processes) >= 4
        child.kill()
        wait_for(lambda: not any(map(alive, processes)), 2, "the phone's end")
        assert list((tmp_path / "phones").iterdir()) == []
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5)


def test_a_killed_launcher_takes_the_phone_along_and_the_next_start_cleans_up(
    phone: MakePhone, tmp_path: Path
) -> None:
    made = phone()
    processes = tree(made.launcher_pid)
    os.kill(made.launcher_pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, processes)), 2, "the phone's end")
    with pytest.raises(VirtualPhoneFailed, match="gone"):
        made.truth()
    left = made.folder
    made.stop()
    assert left.exists()
    phone(name="other")
    assert not left.exists()


def test_a_terminated_launcher_cleans_up(phone: MakePhone) -> None:
    made = phone()
    processes = tree(made.launcher_pid)
    os.kill(made.launcher_pid, signal.SIGTERM)
    wait_for(lambda: not any(map(alive, processes)), 5, "the phone's end")
    assert not made.folder.exists()


def test_without_privilege_it_runs_in_a_user_namespace(
    cache: Path, server: PrivateAdbServer, tmp_path: Path
) -> None:
    """As an ordinary user would; root gives up what makes it root, but for mapping its own id."""
    drop: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv (util-linux) is not here, so root cannot give up its privileges")
        drop = ("setpriv", "--inh-caps=-all", "--bounding-set=-all,+setfcap")
    with run_child(tmp_path / "phones", cache, *drop) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        address, launcher = child.stdout.readline().split()
        try:
            init = sorted(tree(int(launcher)))[2]
            assert os.readlink(f"/proc/{init}/ns/user") != os.readlink("/proc/self/ns/user")
            server.connect(address, Deadline(20))
            adb = Adb(server, address)
            assert adb("id -u") == "2000\n"
            assert "CapEff:\t0000000000000000" in adb("cat /proc/self/status")
            for path in ("/system/x", "/x", "/sys/x", "/proc/meminfo", "/proc/cpuinfo"):
                assert adb.run(f"touch {path}").returncode != 0, path
            assert adb.run("cat /sys/class/power_supply/battery/current_now").returncode != 0
            assert adb.run("[ -t 1 ] && echo terminal", "-tt").stdout == "terminal\n"
            adb("echo 1 > /data/local/tmp/x")
            assert listening(tree(int(launcher))) == {address}
        finally:
            child.stdin.write("stop\n")
            child.stdin.close()
        assert child.wait(20) == 0
    assert list((tmp_path / "phones").iterdir()) == []


def test_where_no_namespace_is_allowed_the_reason_is_given(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel refuses it: with no capability root may not even map its own id."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root with setpriv (util-linux) can be made to lack this")
    drop = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")
    launcher = (*drop, sys.executable, "-P", "-S", "-m", "device_agents.virtual.launcher")
    monkeypatch.setattr("device_agents.virtual.phone._LAUNCHER", launcher)
    made = VirtualPhone("phone", load_profile(), "x86_64", tmp_path / "phones", cache)
    with pytest.raises(VirtualPhoneUnavailable, match=r"allows no virtual phones: .*\(EPERM\); run as root"):
        made.start(Deadline(60))
    assert list((tmp_path / "phones").iterdir()) == []


def test_two_runs_in_one_folder_have_phones_of_the_same_name(cache: Path, tmp_path: Path) -> None:
    """All at the same moment, and beside what killed ones left: nobody takes a living phone's folder."""
    folder = tmp_path / "phones"
    for n in range(4):
        (folder / f"phone-{n}").mkdir(parents=True)
        (folder / f"phone-{n}" / "phone.lock").touch()
    phones = [VirtualPhone("phone", load_profile(), "x86_64", folder, cache) for _ in range(4)]
    try:
        with ThreadPoolExecutor(len(phones)) as pool:
            assert len(set(pool.map(lambda each: each.start(Deadline(60)), phones))) == len(phones)
        assert {each.folder for each in phones} == set(folder.iterdir())
        for each in phones:
            each.truth()
    finally:
        for each in phones:
            each.stop()
    assert list(folder.iterdir()) == []


def test_memory_and_cores_are_the_profiles(phone: MakePhone, server: PrivateAdbServer) -> None:
    """Not this machine's."""
    profile = load_profile("pixel-9-16k")
    adb = connect(server, phone("pixel-9-16k"))
    facts = read_facts(AdbTransport(AdbServer(server.port, start=False), adb.address), Deadline(20))
    assert (facts.ram_bytes, facts.cores) == (profile.ram_mib << 20, profile.cores)
    assert adb("grep -c ^processor /proc/cpuinfo") == f"{profile.cores}\n"
    assert adb("ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l") == f"{profile.cores}\n"
    assert 0 < int(adb("grep MemAvailable /proc/meminfo").split()[1]) < profile.ram_mib * 1024


def test_the_users_adb_server_forgets_a_phone_that_ends_however_it_ends(
    cache: Path, server: PrivateAdbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.port))

    def started() -> VirtualPhone:
        made = VirtualPhone("phone", load_profile(), "x86_64", tmp_path / "phones", cache, shared=True)
        server.connect(made.start(Deadline(60)), Deadline(20))
        return made

    made = started()
    assert server.query("host:devices", Deadline(5)) == f"{made.address}\tdevice\n"
    made.stop()
    assert server.query("host:devices", Deadline(5)) == ""
    killed = started()
    os.kill(killed.launcher_pid, signal.SIGKILL)
    wait_for(lambda: "offline" in server.query("host:devices", Deadline(5)), 5, "its end")
    following = started()
    assert server.query("host:devices", Deadline(5)) == f"{following.address}\tdevice\n"
    killed.stop()
    following.stop()


def test_three_phones_at_once_do_not_meet(phone: MakePhone, server: PrivateAdbServer) -> None:
    phones = [phone(name=f"phone-{n}") for n in range(3)]
    adbs = [connect(server, each) for each in phones]
    for each, adb in zip(phones, adbs, strict=True):
        assert adb("getprop ro.serialno") == f"{each.name}\n"
        adb(f"echo {each.name} > /data/local/tmp/who")
    phones[1].stop()
    for n in (0, 2):
        assert adbs[n]("cat /data/local/tmp/who") == f"phone-{n}\n"


# arm64


def arm64_program() -> bytes:
    """A whole static aarch64 ELF program: write(1, "arm64\\n", 6), exit(7)."""
    code = struct.pack(
        "<8I",
        0xD2800020,  # mov x0, #1
        0x100000E1,  # adr x1, the text, 28 bytes on
        0xD28000C2,  # mov x2, #6
        0xD2800808,  # mov x8, #64 (write)
        0xD4000001,  # svc #0
        0xD28000E0,  # mov x0, #7
        0xD2800BA8,  # mov x8, #93 (exit)
        0xD4000001,  # svc #0
    )
    body = code + b"arm64\n"
    base, head = 0x400000, 64 + 56
    elf = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf += struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, base + head, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = head + len(body)
    return elf + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000) + body


def test_an_arm64_phone_says_so_and_runs_arm64_programs(
    phone: MakePhone, server: PrivateAdbServer, tmp_path: Path
) -> None:
    adb = connect(server, phone(abi="arm64-v8a"))
    assert adb("getprop ro.product.cpu.abi; uname -m") == "arm64-v8a\naarch64\n"
    assert "CPU part\t: 0xd4e" in adb("cat /proc/cpuinfo")
    program = tmp_path / "program"
    program.write_bytes(arm64_program())
    program.chmod(0o755)
    adb.push(program, "/data/local/tmp/program")
    result = adb.run("$KV_EMU /data/local/tmp/program")
    assert (result.returncode, result.stdout) == (7, "arm64\n")


# The command


def test_phones_up_prints_addresses_and_ends_with_ctrl_c(cache: Path, server: PrivateAdbServer) -> None:
    code = "import sys; from harness.cli import run; sys.exit(run(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, "phones", "up", "--count", "2", "--profile", "galaxy-s24", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as command:
        try:
            assert command.stdout is not None
            assert command.stderr is not None
            phones = json.loads(command.stdout.readline())["phones"]
            assert [each["virtual"] for each in phones] == [True, True]
            for each in phones:
                server.connect(each["address"], Deadline(20))
                assert Adb(server, each["address"])("getprop ro.product.model") == f"{each['model']}\n"
            processes = tree(command.pid)
            command.send_signal(signal.SIGINT)
            assert command.wait(20) == 0
            assert "virtual" in command.stderr.read()
        finally:
            command.kill()  # else a failure here would wait for it for ever
    assert not [pid for pid in processes if alive(pid)]
