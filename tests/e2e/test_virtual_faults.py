"""What a virtual phone can be made to suffer, and that it comes back from it, or does not."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from pathlib import Path

import psutil
import pytest

from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, InfrastructureError
from device_agents.virtual import VirtualPhoneFailed
from device_agents.virtual.adb import PrivateAdbServer
from tests.device_agents.virtual_support import MakePhone, connect, wait_for
from tests.e2e.phones import cache, phone, server

__all__ = ["cache", "phone", "server"]  # fixtures


def test_cut_breaks_what_runs_and_adb_comes_back(phone: MakePhone, server: PrivateAdbServer) -> None:
    made = phone()
    adb = connect(server, made)
    cutting = threading.Timer(0.3, made.relay.cut)
    cutting.start()
    result = adb.run("echo begun; sleep 10; echo done")
    cutting.join()
    assert result.stdout == "begun\n"
    assert result.returncode != 0
    wait_for(adb.answers, 20, "adb after the cut")


def test_freeze_delays_and_loses_nothing(phone: MakePhone, server: PrivateAdbServer) -> None:
    made = phone()
    adb = connect(server, made)
    made.relay.freeze(1.5)
    began = time.monotonic()
    assert adb("echo late") == "late\n"
    assert time.monotonic() - began > 1.3


def test_refused_connections_come_back_when_allowed(phone: MakePhone, server: PrivateAdbServer) -> None:
    made = phone()
    made.relay.refuse(True)
    with pytest.raises(AdbFailure):
        server.connect(made.address, Deadline(1))
    made.relay.refuse(False)
    assert connect(server, made)("echo yes") == "yes\n"


def test_corruption_arrives_in_a_pushed_file(
    phone: MakePhone, server: PrivateAdbServer, tmp_path: Path
) -> None:
    made = phone()
    adb = connect(server, made)
    blob = tmp_path / "blob"
    blob.write_bytes(random.Random(3).randbytes(3_000_000))
    digest = hashlib.sha256(blob.read_bytes()).hexdigest()
    adb.push(blob, "/data/local/tmp/whole")
    assert adb("sha256sum /data/local/tmp/whole").split()[0] == digest
    made.relay.corrupt("to_phone", 1_500_000)
    adb.push(blob, "/data/local/tmp/bad")
    assert adb("sha256sum /data/local/tmp/bad").split()[0] != digest
    assert int(adb("cmp -l /data/local/tmp/whole /data/local/tmp/bad | wc -l; true")) == 1


def test_a_killed_adbd_is_started_again(phone: MakePhone, server: PrivateAdbServer) -> None:
    made = phone()
    adb = connect(server, made)
    adb("echo kept > /data/local/tmp/x")
    made.kill_adbd()
    wait_for(lambda: not adb.answers(), 5, "adb's notice of it")
    wait_for(adb.answers, 20, "adb with the new adbd")
    assert adb("cat /data/local/tmp/x") == "kept\n"


def test_a_reboot_keeps_the_address_and_the_data(phone: MakePhone, server: PrivateAdbServer) -> None:
    made = phone()
    adb = connect(server, made)
    adb("echo kept > /data/local/tmp/x; settings put global kept 1; setprop debug.gone 1")
    adb("cmd power set-fixed-performance-mode-enabled true")
    address = made.address
    made.reboot(0.5)
    assert made.relay.state()["up"] == 0
    with pytest.raises(VirtualPhoneFailed, match="is off"):
        made.truth()
    wait_for(adb.answers, 30, "adb after the reboot")
    assert made.address == address
    assert adb("cat /data/local/tmp/x; settings get global kept; getprop debug.gone") == "kept\n1\n\n"
    assert adb("cat /sys/devices/system/cpu/cpu8/cpufreq/scaling_max_freq") == "2914000\n"


def test_adbd_can_be_killed_at_a_byte(phone: MakePhone, server: PrivateAdbServer, tmp_path: Path) -> None:
    made = phone()
    adb = connect(server, made)
    adb("true")
    (tmp_path / "big").write_bytes(os.urandom(8 << 20))
    made.kill_adbd(at=("to_phone", 3 << 20))
    assert adb.answers()  # not yet
    with pytest.raises(AssertionError, match=r"adb: error|failed|closed"):
        adb.push(tmp_path / "big", "/data/local/tmp/big")
    wait_for(adb.answers, 20, "adb with the new adbd")


def test_an_unplugged_phone_stays_away(phone: MakePhone, server: PrivateAdbServer) -> None:
    made = phone()
    adb = connect(server, made)
    made.unplug()
    wait_for(lambda: not adb.answers(), 5, "adb's notice of it")
    with pytest.raises(InfrastructureError):
        server.connect(made.address, Deadline(1.5))
    assert not made.dead
    assert made.relay.state()["up"] == 1


def test_a_full_storage_is_full_and_has_room_again(phone: MakePhone, server: PrivateAdbServer) -> None:
    made = phone(storage=64 << 20)
    adb = connect(server, made)
    write = "head -c 8388608 /dev/zero > /data/local/tmp/x"
    made.fill_storage()
    full = adb.run(write)
    assert full.returncode != 0
    assert "No space left" in full.stderr
    assert int(adb("df -k /data | tail -n 1").split()[3]) <= 4
    made.fill_storage(None)
    adb(write)
    with pytest.raises(VirtualPhoneFailed, match="no limit of its own"):
        phone(name="other").fill_storage()


def test_a_phone_whose_first_process_was_killed_is_dead_and_a_rebooting_one_is_not(phone: MakePhone) -> None:
    made = phone()
    made.reboot(0.3)
    assert not made.dead
    wait_for(lambda: bool(made.relay.state()["up"]), 5, "the phone")
    (keeper,) = psutil.Process(made.launcher_pid).children()
    keeper.children()[0].kill()
    wait_for(lambda: made.dead, 5, "its launcher's notice of it")
