"""A wrong ANDROID_ADB_SERVER_PORT is one clear line, though adbutils stumbles over it on import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_port_that_is_none_is_told_and_is_no_traceback(tmp_path: Path) -> None:
    found = subprocess.run(
        [str(Path(sys.executable).with_name("kvfarm")), "devices", "--devices", "adb"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ANDROID_ADB_SERVER_PORT": "foo"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode != 0
    assert "sought a port in ANDROID_ADB_SERVER_PORT, found 'foo'" in found.stderr
    assert "Traceback" not in found.stderr
