"""Virtual phones: what adb takes for an Android phone, made of namespaces and Debian packages.

Start with ``VirtualPhone`` and ``load_profile``; ``device_agents.virtual.adb`` runs an adb server of
our own. What is measured on one is simulated and must be marked so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from device_agents.virtual.errors import VirtualPhoneFailed, VirtualPhoneUnavailable
    from device_agents.virtual.phone import VirtualPhone
    from device_agents.virtual.profile import Profile, load_profile, profile_names

_HOME = {
    "Profile": "profile",
    "VirtualPhone": "phone",
    "VirtualPhoneFailed": "errors",
    "VirtualPhoneUnavailable": "errors",
    "load_profile": "profile",
    "profile_names": "profile",
}

__all__ = [
    "Profile",
    "VirtualPhone",
    "VirtualPhoneFailed",
    "VirtualPhoneUnavailable",
    "load_profile",
    "profile_names",
]


def __getattr__(name: str) -> Any:
    # Only when asked for: the launcher of each phone imports this package too, and must not load numpy.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
