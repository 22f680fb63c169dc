"""HEALTHCHECK of the image: does torchrun have all of its ranks, and do they run?

    healthy    nothing is started by torchrun here; it waits for other nodes; all of its ranks exist
    unhealthy  a rank is missing, dead, or stopped (SIGSTOP, a debugger)

Whether ranks that run also get on is none of its business: every wait in a rank has a deadline, at which the job ends
with a line. One line here, exit code 0 or 1. It reads /proc and imports no torch: it is done in a tenth of a second.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
STOPPED = "Tt"


@dataclass(frozen=True)
class Process:
    """A process of this user; ``environment`` is empty once it is dead."""

    parent: int
    state: str
    environment: dict[str, str]


def processes(proc: Path) -> dict[int, Process]:
    """By their ids."""
    found = {}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # gone, or of another user
            continue
        environment = {name: value for name, _, value in (word.partition("=") for word in words)}
        found[int(folder.name)] = Process(int(parent), state, environment)
    return found


def ranks(found: dict[int, Process]) -> dict[int, Process]:
    """By their local ranks: what torchrun has started, and not what those have started."""

    def is_rank(process: Process | None) -> bool:
        return process is not None and "LOCAL_RANK" in process.environment

    started = [process for process in found.values() if is_rank(process) and not is_rank(found.get(process.parent))]
    return {int(process.environment["LOCAL_RANK"]): process for process in started}


def fault(found: dict[int, Process]) -> str:
    """What is wrong, or nothing."""
    here = ranks(found)
    expected = max((int(process.environment["LOCAL_WORLD_SIZE"]) for process in here.values()), default=0)
    missing = [str(rank) for rank in range(expected) if rank not in here]
    stopped = [str(rank) for rank, process in sorted(here.items()) if process.state in STOPPED]
    if missing:
        return f"of {expected} ranks here, these are missing: {', '.join(missing)}"
    return f"these ranks are stopped: {', '.join(stopped)}" if stopped else ""


def main(proc: Path = PROC) -> int:
    found = processes(proc)
    wrong = fault(found)
    print(f"unhealthy: {wrong}" if wrong else f"healthy: {len(ranks(found))} ranks")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
