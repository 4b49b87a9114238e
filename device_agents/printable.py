"""Text from a device, a model or a log, as a terminal may get it: nothing in it commands the terminal."""

from __future__ import annotations

import re

# C0 but tab and newline, DEL, C1 (0x9b alone is what ESC [ is), what changes the direction of writing, so
# that a line reads otherwise than it is (CVE-2021-42574), line and paragraph separators, lone surrogates.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with each such character as what Python writes for it: an ESC becomes ``\\x1b``."""
    return _COMMANDS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
