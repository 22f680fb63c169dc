"""A process of the job, recognised by the others on its machine: by /proc on Linux, by ``ps`` elsewhere (macOS)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
REAP_S = 2.0
"""Seconds that other processes of a failed job have to end by themselves."""
PS_S = 5.0
"""Seconds that ``ps`` may take; without an answer a process counts as alive."""


@dataclass(frozen=True)
class Process:
    """A process, recognisable even after its pid has been used again."""

    pid: int
    started: str
    host: str
    modules: str

    @classmethod
    def current(cls, modules: str) -> Process:
        """This process."""
        return cls(os.getpid(), _state(os.getpid())[1], _host(), modules)

    def gone(self) -> bool:
        """True if the process (of this host) has ended; a zombie has ended."""
        state, started = _state(self.pid)
        return state in ("", "Z", "X") or started != self.started


def reap(processes: Sequence[Process]) -> None:
    """Wait until these processes of this host are gone, and kill those that are not after REAP_S."""
    end = time.monotonic() + REAP_S
    while time.monotonic() < end and not all(process.gone() for process in processes):
        time.sleep(0.05)
    for process in processes:
        if not process.gone():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def _host() -> str:
    """Containers can share a host name, so the pid namespace is part of it where there are any."""
    try:
        return f"{socket.gethostname()} {os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _state(pid: int) -> tuple[str, str]:
    """(state letter, start time), ("", "") if there is no such process."""
    return _state_from_proc(pid) if (PROC / "self/stat").exists() else _state_from_ps(pid)


def _state_from_proc(pid: int) -> tuple[str, str]:
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _state_from_ps(pid: int) -> tuple[str, str]:
    """Without /proc. ``ps`` is asked each time: a zombie still answers to signal 0."""
    command = ["ps", "-o", "state=", "-o", "lstart=", "-p", str(pid)]
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}  # the same text from every process
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PS_S, env=environment).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return _state_from_signal(pid)
    return (answer[0][0], " ".join(answer[1:])) if answer else ("", "")


def _state_from_signal(pid: int) -> tuple[str, str]:
    """Where ``ps`` does not answer either: a pid that is used again is taken for the process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "", ""
    except PermissionError:
        pass
    return "?", ""
