"""Many small questions in one shell command, and the answers told apart.

A device answers a command in 20 to 50 ms, however small, so what is asked together goes together.
"""

from __future__ import annotations

from collections.abc import Mapping

from device_agents.adb.transport import AdbTransport
from device_agents.deadline import Deadline

_MARK = "--kvfarm-section--"


def ask(transport: AdbTransport, questions: Mapping[str, str], deadline: Deadline) -> dict[str, str]:
    """Each question's (a shell command's) stdout; "" where the device cannot say.

    Raises:
        DeviceUnreachable, DeadlineExceeded, AdbFailure.
    """
    parts = [f"echo {_MARK} {name}; {{ {command}; }} 2>/dev/null" for name, command in questions.items()]
    text = transport.checked("; ".join([*parts, f"echo {_MARK} end"]), deadline)
    answers = dict.fromkeys(questions, "")
    name, lines = "", list[str]()
    for line in text.splitlines():
        if line.startswith(_MARK):
            if name in answers:
                answers[name] = "\n".join(lines).strip()
            name, lines = line.removeprefix(_MARK).strip(), []
        else:
            lines.append(line)
    return answers
