"""The logger: one shell script for mksh, dash and bash that runs on the device by itself.

It ends when told to (a file), after its time, when its log has its size, and never later: also
when nobody is left to tell it. Everything it starts is in its process group, the number of which is in
the file ``pid``.
"""

from __future__ import annotations

from collections.abc import Mapping

from device_agents.recording.answers import QUESTIONS
from device_agents.recording.record import LOG_MOST_BYTES, MARK, Plan

SCRIPT, LOG, STOP, PID = "logger.sh", "log", "stop", "pid"

# Asked in every sample, gauge first: its time is the sample's.
_SUPPLY = (
    "for a in current_now voltage_now charge_counter; do "
    'if read -r b </sys/class/power_supply/battery/$a; then echo "$a $b"; fi; done'
)
_FAST = {
    "supply": _SUPPLY,
    "current": (
        "if ! read -r a </sys/class/power_supply/battery/current_now; then "
        "a=$(cmd battery get -f current_now); "
        "case $a in *[0-9]*) ;; *) a=$(cmd battery get current_now);; esac; "
        'echo "$a"; fi'
    ),
    "battery": QUESTIONS["battery"],
    "rails": (
        "for f in /sys/bus/iio/devices/iio:device*/energy_value; do "
        'while read -r a; do echo "$a"; done <"$f"; done'
    ),
    "zones": QUESTIONS["zones"],
    "clocks": QUESTIONS["clocks"],
    "load": QUESTIONS["load"],
    "stat": 'if read -r a <"/proc/$runner/stat"; then echo "$a"; fi',
}
_SLOW = {
    "thermal": QUESTIONS["thermal"],
    "memory": QUESTIONS["memory"],
    "rollup": (
        'while read -r a; do case $a in Pss:*|Swap:*) echo "$a";; esac; done <"/proc/$runner/smaps_rollup"'
    ),
    "cgroup": 'while read -r a; do echo "$a"; done <"/proc/$runner/cgroup"',
    "cpuset": 'if read -r a <"/proc/$runner/cpuset"; then echo "$a"; fi',
    "suspended": "getprop power.battery_input.suspended",
}
# Uneven pauses, so that work in a rhythm of its own is not always met at the same point of it.
_PAUSES = (1.0, 0.8, 1.15, 0.9, 1.15)


def script(plan: Plan, runner: int | None, cores: int, android: bool) -> str:
    """For ``sh``, started as the leader of a process group in a folder of its own.

    runner: a process to watch. cores: how many to keep busy when the plan says so.
    """
    asked = {"battery", "current", "supply", "thermal", "suspended", "rails"}

    def sections(questions: Mapping[str, str]) -> str:
        wanted = {k: v for k, v in questions.items() if android or k not in asked}
        return "\n".join(
            f"  echo {MARK} {name}; {{ {command}; }} 2>/dev/null" for name, command in wanted.items()
        )

    pauses = "; ".join(f"{i}) sleep {plan.period_s * pause:.2f}" for i, pause in enumerate(_PAUSES))
    pauses = pauses.replace("; ", ";; ")
    burn = plan.burn_after_s is not None
    burn_from, burn_to = int(plan.burn_after_s or 0), int((plan.burn_after_s or 0) + plan.burn_s)
    return f"""
echo $$ >{PID}
ulimit -f {LOG_MOST_BYTES // 512}
exec >{LOG} 2>/dev/null </dev/null
runner={runner or "none"}
read -r up rest </proc/uptime
begun=${{up%.*}}
# Loops in the shell: nothing but the shell itself is started.
burner() {{
  while read -r up rest </proc/uptime; do
    [ ${{up%.*}} -ge $((begun + {burn_to})) ] && exit 0
    i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done
  done
}}
number=0 phase=idle
while [ ! -e {STOP} ]; do
  read -r up rest </proc/uptime
  now=$((${{up%.*}} - begun))
  [ $now -ge {int(plan.max_s)} ] && break
  if [ {int(burn)} = 1 ]; then
    if [ $phase = idle ] && [ $now -ge {burn_from} ] && [ $now -lt {burn_to} ]; then
      phase=burn
      i=0; while [ $i -lt {cores} ]; do burner & i=$((i + 1)); done
    elif [ $phase = burn ] && [ $now -ge {burn_to} ]; then phase=idle
    fi
  fi
  number=$((number + 1))
  echo {MARK} sample $number $up ${{EPOCHREALTIME:--}} $phase
{sections(_FAST)}
  if [ $((number % {plan.slow_every})) = 1 ] || [ {plan.slow_every} = 1 ]; then
    :
{sections(_SLOW)}
  fi
  echo {MARK} end $number
  case $((number % {len(_PAUSES)})) in {pauses};; esac
done
wait
"""
