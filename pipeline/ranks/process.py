"""A process of the job, recognised by the others on its machine."""

from __future__ import annotations

import os
import resource
import socket
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Process:
    """A process, recognisable even after its pid has been used again."""

    pid: int
    started: str
    host: str
    modules: str

    @classmethod
    def current(cls, modules: str) -> Process:
        """This process. Containers can share a host name, so the pid namespace is part of ``host``."""
        host = f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
        return cls(os.getpid(), _stat(os.getpid())[1], host, modules)

    def gone(self) -> bool:
        """True if the process (of this host) has ended; a zombie has ended."""
        state, started = _stat(self.pid)
        return state in ("", "Z", "X") or started != self.started


def _stat(pid: int) -> tuple[str, str]:
    """(state letter, start time) from /proc, ("", "") if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory use of this process so far: allocated on the GPU, resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
