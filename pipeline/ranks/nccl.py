"""What NCCL's watchdog may do, so that a failure is said on our line and not by its abort.

    our wait      deadline_s, then one line and exit                      (main thread, pipeline.edges.end)
    watchdog      a transfer that failed: it ends the process             TORCH_NCCL_ASYNC_ERROR_HANDLING, default 3
                  a transfer that takes too long: likewise                none does: groups wait for ever
    its monitor   a watchdog that is stuck: it ends the process           TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC, default 480

A transfer that has failed is seen by the thread that waits for it (``Work.is_completed``, ``Work.wait``), which tells
the main thread; that has a deadline whatever happens. So the watchdog needs to do nothing. The variables must be there
before the first group is. Source: ``ProcessGroupNCCL.hpp`` of torch 2.14; nothing of this was run on a GPU.
"""

from __future__ import annotations

from collections.abc import MutableMapping

HANDLING, BLOCKING, HEARTBEAT = (
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_BLOCKING_WAIT",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",
)
NO_HANDLING = "0"
LEAST_HEARTBEAT_S = 480
"""NCCL's own default."""


def leave_failures_to_us(environment: MutableMapping[str, str], deadline_s: float) -> list[str]:
    """Set what is not set, and leave what is. Returns a line about each variable that may end a process before
    ``deadline_s`` has passed, or hold its host up."""
    heartbeat_s = max(LEAST_HEARTBEAT_S, int(2 * deadline_s))
    wanted = {HANDLING: NO_HANDLING, BLOCKING: "0", HEARTBEAT: str(heartbeat_s)}
    lines = []
    for name, value in wanted.items():
        found = environment.setdefault(name, value)
        if found == value or (name == HEARTBEAT and _seconds(found) > deadline_s):
            continue
        lines.append(
            f"{name}={found} in the environment: {_CONSEQUENCES[name].format(deadline_s=deadline_s)}; "
            f"unset it, or use {value}"
        )
    return lines


_CONSEQUENCES = {
    HANDLING: "NCCL ends a process whose transfer has failed before it can say which rank is gone",
    BLOCKING: "the host waits for every transfer, which takes the overlap with computing away",
    HEARTBEAT: "NCCL may end a process within runtime.deadline_s = {deadline_s:g}, before it can say who waits",
}


def _seconds(text: str) -> float:
    return float(text) if text.isdecimal() else 0.0
