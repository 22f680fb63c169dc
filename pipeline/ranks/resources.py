"""What a process may use of its machine, and has used. What only Linux tells has a substitute elsewhere (macOS)."""

from __future__ import annotations

import os
import resource
import sys

import torch


def usable_cores() -> int:
    """Cores that this process may run on; where the system has no affinity, all of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory use of this process so far: allocated on the GPU, resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_resident_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sys.platform)


def _peak_resident_bytes(maxrss: int, platform: str) -> int:
    """``ru_maxrss`` is in bytes on macOS, in KiB on Linux and the BSDs."""
    return maxrss if platform == "darwin" else maxrss * 1024
