"""What both ends of an edge share: who they are, how they wait, how they word a failure."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from pipeline.base.errors import DeadlineExceeded, LocalpipeError, PeerLost
from pipeline.edges.credit import Gate, Payload
from pipeline.edges.wire import MessageSpec, Slot
from pipeline.ranks.team import Team

T = TypeVar("T")


@dataclass(frozen=True)
class Edge:
    """A directed edge as one of its two ranks sees it.

    Attributes:
        team: this rank among all.
        group: of the two ranks alone, gloo.
        peer: the other rank.
        spec: of its messages.
        device: where this rank packs or unpacks them.
        label: what flows, for messages: "activation", "gradient" or "weights".
        payload: carries what is not the header, see :mod:`pipeline.edges.credit`; None: the group carries all.
    """

    team: Team
    group: dist.ProcessGroup
    peer: int
    spec: MessageSpec
    device: torch.device
    label: str
    payload: Payload | None = None


class End:
    """One end of an edge, not yet a sending or a receiving one."""

    def __init__(self, edge: Edge) -> None:
        self.wait_s = 0.0
        self.spec = edge.spec
        self._team = edge.team
        self._group = edge.group
        self._peer = edge.peer
        self._device = edge.device
        self._label = edge.label
        self._payload = edge.payload
        self._fingerprint = edge.spec.fingerprint()
        name = f"{self._label}-{self._peer}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        cuda = edge.device.type == "cuda"
        self._copies = torch.cuda.Stream(edge.device) if cuda and edge.payload is None else None
        beside = cuda or edge.payload is not None
        self._gate = Gate(f"{name}-gate", self._bind_device, self._gate_failed) if beside else None

    def _start(self) -> None:
        """Start the threads, once everything that they use is there."""
        self._thread.start()
        if self._gate is not None:
            self._gate.thread.start()

    def _run(self) -> None:
        self._bind_device()
        self._loop()
        if self._gate is not None:
            self._gate.close()

    def _loop(self) -> None:
        """What the thread of this end does."""
        raise NotImplementedError

    def _gate_failed(self, error: Exception) -> None:
        """A message, or a receive, could not be posted (gate's thread)."""
        if not isinstance(error, PeerLost):  # the peer has nothing to do with it
            where = f"the {self._label} edge to rank {self._peer}"
            error = LocalpipeError(f"rank {self._team.rank}: the device failed behind {where} ({_first_line(error)})")
        self._broken(error)

    def _broken(self, error: Exception) -> None:
        """Nothing more will be sent, or arrive: whoever waits in the main thread raises this. From any thread."""
        raise NotImplementedError

    def _new_slot(self) -> Slot:
        return Slot(self.spec, self._device, self._payload is not None, self._copies)

    def _after(self, ready: Callable[[], None], act: Callable[[], None]) -> None:
        """Call ``act`` when the device has come so far that ``ready`` returns; at once where there is no device."""
        if self._gate is None:
            act()
        else:
            self._gate.after(ready, act)

    def _bind_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is per thread

    def _wait(self, look: Callable[[float], T], what: str, left_s: float | None = None) -> T:
        """What ``look(seconds)`` returns. It raises queue.Empty when the seconds are over; when ``left_s`` of the
        deadline are, it is called again as long as patience lasts."""
        awaited = (self._peer, what)
        return self._team.wait(look, lambda: awaited, lambda *why: self._late(what, *why), left_s=left_s)

    def _late(self, what: str, waited_s: float, verdict: str) -> DeadlineExceeded:
        deadline_s = self._team.deadline_s
        limit = f" (deadline {deadline_s:g} s)" if waited_s > deadline_s else ""
        return DeadlineExceeded(
            f"rank {self._team.rank} has waited {waited_s:g} s{limit} {what}{self._history()}; {verdict}"
        )

    def _history(self) -> str:
        """What this end has seen of its peer, for a message."""
        return ""

    def _join(self, what: str, left_s: float | None = None) -> None:
        """Wait until the threads have ended."""
        threads = [self._thread] if self._gate is None else [self._thread, self._gate.thread]

        def look(seconds: float) -> None:
            for thread in threads:
                thread.join(seconds)
                if thread.is_alive():
                    raise queue.Empty

        self._wait(look, what, left_s)

    def _lost(self, doing: str, cause: BaseException) -> PeerLost:
        reason = _first_line(cause)
        return PeerLost(self._peer, f"rank {self._team.rank} was {doing} when the connection was lost ({reason})")


def _first_line(cause: BaseException) -> str:
    """What a message quotes of it."""
    # gloo: "[<path of its build>] Connection closed by peer [127.0.0.1]:37112. This is typically ..."
    text = re.sub(r"^\[[^]]*\] ", "", str(cause)).split(". ")[0].splitlines()[:1]
    return "".join(text) or type(cause).__name__
