"""adbutils, importable whatever is in ANDROID_ADB_SERVER_PORT.

It makes a client while it is imported, and reads that variable as a number; AdbServer.default tells what
is wrong with it, for whoever uses it.
"""

from __future__ import annotations

import os

_VARIABLE = "ANDROID_ADB_SERVER_PORT"
_kept = os.environ.get(_VARIABLE)
try:
    if _kept is not None and not _kept.isdecimal():
        del os.environ[_VARIABLE]
    import adbutils as adbutils
    from adbutils.errors import AdbError as AdbError
finally:
    if _kept is not None:
        os.environ[_VARIABLE] = _kept
