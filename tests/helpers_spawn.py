"""Ranks in real processes: those of ``benchmarks/ranks.py``, under the names that the tests use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from ranks import RankResult, free_port, run_processes

__all__ = ["RankResult", "free_port", "run_ranks"]


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0
) -> list[RankResult]:
    """Call ``function(rank, *args)`` in ``world_size`` processes and return how each ended, by rank; see there."""
    return run_processes(function, world_size, *args, timeout_s=timeout_s)
