"""What the system lets this process have: limits of the process (ulimit) and of its control groups (containers).

    /proc/self/cgroup    0::/user.slice/job                  version 2: one tree, files memory.max, cpu.max, pids.max
                         4:memory:/docker/1f2a               version 1: a tree per kind, memory.limit_in_bytes, ...

The limit that counts is the lowest one on the way from the group to the root of what is mounted here.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.ranks.resources import usable_cores

UNLIMITED = math.inf
HUGE = 1 << 60
"""Version 1 writes a number near 2^63 where there is no limit of memory."""


@dataclass(frozen=True)
class Roots:
    """Where the system tells of itself; a test puts files of its own there."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    shared_memory: Path = Path("/dev/shm")


@dataclass(frozen=True)
class Cgroup:
    """Limits of the control groups of this process; ``inf`` where there is none.

    Attributes:
        memory_bytes, memory_used_bytes: the lowest limit, and what its group uses.
        cores: CPU time per time.
        processes: how many more processes and threads may begin.
    """

    memory_bytes: float = UNLIMITED
    memory_used_bytes: float = 0.0
    cores: float = UNLIMITED
    processes: float = UNLIMITED

    @classmethod
    def read(cls, roots: Roots) -> Cgroup:
        """As of now."""
        memory, used, cores, processes = UNLIMITED, 0.0, UNLIMITED, UNLIMITED
        for folder in _folders(roots, "memory"):
            for most, now in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
                limit = _number(folder / most)
                if limit < min(memory, HUGE):
                    memory, used = limit, _number(folder / now, 0.0)
        for folder in _folders(roots, "cpu"):
            quota, period = _quota(folder)
            if quota > 0:
                cores = min(cores, quota / period)
        for folder in _folders(roots, "pids"):
            processes = min(processes, _number(folder / "pids.max") - _number(folder / "pids.current", 0.0))
        return cls(memory, used, cores, processes)


def _folders(roots: Roots, kind: str) -> Iterator[Path]:
    """Of the control groups of this process, each with those above it."""
    try:
        lines = (roots.proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    top = roots.sys / "fs/cgroup"
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and kind not in kinds.split(","):
            continue
        mounted = top if not kinds else next((top / name for name in (kinds, kind) if (top / name).is_dir()), top)
        group = mounted / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mounted))


def _quota(folder: Path) -> tuple[float, float]:
    """(microseconds of CPU time, in so many of time); (-1, 1) without a limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return (-1.0, 1.0) if quota == "max" else (float(quota), float(period))
    except (OSError, ValueError):
        return _number(folder / "cpu.cfs_quota_us", -1.0), _number(folder / "cpu.cfs_period_us", 1.0)


def _number(path: Path, default: float = UNLIMITED) -> float:
    """The number in a file; ``default`` where there is none, or the word ``max``."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return default


def cores_in_use(cgroup: Cgroup) -> float:
    """Cores that this process can really have at a time: those it may run on, or less by its quota."""
    return min(float(usable_cores()), cgroup.cores)


def soft_limit(kind: int) -> float:
    """A limit of this process, as ``resource.RLIMIT_NOFILE``."""
    soft, _ = resource.getrlimit(kind)
    return UNLIMITED if soft == resource.RLIM_INFINITY else float(soft)


def available_memory(roots: Roots, cgroup: Cgroup) -> float:
    """Bytes that new processes can still have; ``inf`` where the system does not tell (macOS)."""
    free = UNLIMITED
    try:
        for line in (roots.proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = float(line.split()[1]) * 1024
    except OSError:
        pass
    return min(free, cgroup.memory_bytes - cgroup.memory_used_bytes)
