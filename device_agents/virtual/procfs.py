"""What /proc/meminfo and /proc/cpuinfo of a virtual phone say: its profile's memory and cores.

Bound over the kernel's own, which tell of the machine that the phone runs on. Formats: proc_meminfo(5),
proc_cpuinfo(5), Linux arch/arm64/kernel/cpuinfo.c and arch/x86/kernel/cpu/proc.c.
"""

from __future__ import annotations

import re

from device_agents.virtual.profile import Profile

_FEATURES = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop"
)
_KIB = 1024


def meminfo(profile: Profile, held: int, host: str) -> str:
    """The phone's memory, with what its processes hold taken off.

    held: by them, bytes. host: the machine's own /proc/meminfo. What is available is never more than the
    machine has left, for that is where it comes from. The same length every time, so that it can be
    written over itself.
    """
    total = profile.ram_mib * _KIB
    left = max(0, min(total - held // _KIB, _available(host, total)))
    lines = {"MemTotal": total, "MemFree": left, "MemAvailable": left, "SwapTotal": 0, "SwapFree": 0}
    return "".join(f"{name + ':':<16}{size:>8} kB\n" for name, size in lines.items())


def cpuinfo_arm(profile: Profile) -> str:
    """Of an Arm kernel. With the host's own, qemu 7.2 crashes on import of onnxruntime."""
    blocks: list[str] = []
    for cluster in profile.clusters:
        for _ in range(cluster.cores):
            blocks.append(
                f"processor\t: {len(blocks)}\nBogoMIPS\t: 49.15\nFeatures\t: {_FEATURES}\n"
                f"CPU implementer\t: {cluster.implementer:#04x}\nCPU architecture: 8\nCPU variant\t: 0x1\n"
                f"CPU part\t: {cluster.part:#05x}\nCPU revision\t: 0\n\n"
            )
    return "".join(blocks)


def cpuinfo_x86(profile: Profile, host: str) -> str:
    """As many processors as the phone has, each with the flags of the machine's own, for those are true.

    host: the machine's /proc/cpuinfo.
    """
    first = host.partition("\n\n")[0]
    blocks = []
    for number in range(profile.cores):
        ours = {
            "processor": number,
            "model name": f"{profile.soc_manufacturer} {profile.soc_model} (virtual)",
            "physical id": 0,
            "siblings": profile.cores,
            "core id": number,
            "cpu cores": profile.cores,
            "apicid": number,
            "initial apicid": number,
        }
        lines = [line.partition(":") for line in first.splitlines()]
        told = [f"{key}: {ours.get(key.strip(), rest.strip())}" for key, _, rest in lines]
        blocks.append("\n".join(told) + "\n\n")
    return "".join(blocks)


def _available(host: str, otherwise: int) -> int:
    """KiB."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", host, re.MULTILINE)
    return int(found[1]) if found else otherwise
