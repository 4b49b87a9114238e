"""A recording on a device reached by shell: start it detached, end it, bring its log, leave nothing."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError
from device_agents.recording.logger import LOG, PID, SCRIPT, STOP
from device_agents.recording.record import LOG_MOST_BYTES, Record, parse_log

Shell = Callable[[str, Deadline, bytes], bytes]
"""The stdout of a script that succeeds on the device, given its stdin. Raises InfrastructureError."""

# A process number may be somebody else's by now: only what runs our script is ended.
_END = f"""
if read -r p <{PID} && grep -q {SCRIPT} /proc/$p/cmdline; then
  kill -KILL -$p || kill -KILL $p
fi 2>/dev/null
"""
_START = (
    "if cd {folder} 2>/dev/null; then "
    + _END
    + f"""fi
cd / && rm -rf {{folder}} && mkdir -p {{folder}} && cd {{folder}} && cat >{SCRIPT} || exit 1
setsid sh {SCRIPT} </dev/null >/dev/null 2>&1 &
i=0; while [ ! -s {LOG} ] && [ $i -lt 50 ]; do sleep 0.1; i=$((i + 1)); done
[ -s {LOG} ] || {{{{ echo "the logger does not start" >&2; exit 1; }}}}
"""
)
_STOP = (
    f"""
cd {{folder}} || exit 0
: >{STOP}
read -r p <{PID}
i=0; while grep -q {SCRIPT} /proc/$p/cmdline && [ $i -lt 30 ]; do sleep 0.1; i=$((i + 1)); done 2>/dev/null
"""
    + _END
    + f"""
head -c {LOG_MOST_BYTES} {LOG}
cd / && rm -rf {{folder}}
"""
)


class ShellRecording:
    """A Recording in ``folder`` on the device, of which there is one at a time."""

    def __init__(self, shell: Shell, folder: str) -> None:
        self._shell = shell
        self._folder = shlex.quote(folder)

    def start(self, script: str, deadline: Deadline) -> ShellRecording:
        """End whatever recorded in this folder before, and begin.

        Raises:
            InfrastructureError: the device is gone, or does not start the logger.
        """
        self._shell(_START.format(folder=self._folder), deadline, script.encode())
        return self

    def stop(self, deadline: Deadline) -> Record:
        """See Recording.stop."""
        text = self._shell(_STOP.format(folder=self._folder), deadline, b"")
        if not text:
            raise InfrastructureError(f"sought the log of a recording in {self._folder}, found none")
        return parse_log(text.decode(errors="replace"))
