"""Which machine a binary is for, from its first bytes (ELF-64 specification, e_ident and e_machine)."""

from __future__ import annotations

import struct
from pathlib import Path

_HEADER = struct.Struct("<4sBB10xHH")  # magic, class, data encoding, e_type, e_machine
_MACHINES = {62: "x86_64", 183: "aarch64", 3: "i386", 40: "arm", 243: "riscv64"}


def machine_of(path: Path) -> str | None:
    """As uname -m says it; None for what is no little-endian ELF file."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return None
    magic, _, encoding, _, machine = _HEADER.unpack(head)
    if magic != b"\x7fELF" or encoding != 1:
        return None
    return _MACHINES.get(machine, f"ELF machine {machine}")
