"""Sums over the twins of a stage, one rank per replica: begun as soon as their terms are there, waited for when needed.

    replica 0, stage s    backward of m | backward of m-1 ...          | wait | update m
                                     \\== sum of m, on its way ======/
    replica 1, stage s    backward of m | ...

torch does the summing: one coalesced all-reduce of all tensors of a dtype, in an order that depends on the ranks and
the sizes alone, so that runs repeat. (DistributedDataParallel drives the same all-reduce from hooks on one forward and
one backward of a module. A local module has several of both in a step: a head on each patch, an activation-only
backward, a backward on stashed weights; so the stage, which knows when its gradients are complete, begins the sum.)

On the host a sum is waited for with the patience of the team. What NCCL sums is waited for by the device, in the order
of the stream. The host, which is ahead of it, waits with the same patience, an update later: else it would come to wait
for a device that itself waits for a twin, and would know nothing of that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager

from pipeline.base.errors import DeadlineExceeded, PeerLost
from pipeline.ranks.grid import Grid
from pipeline.ranks.keys import Key
from pipeline.ranks.team import Team

LOOK_S = 0.5
"""Between two looks at who is missing."""
SHORTEST_POLL_S, LONGEST_POLL_S = 20e-6, 5e-3
"""Between two looks at a sum of a GPU, first and last."""


class Twins:
    """The ranks that have the same stage as this one.

    Args:
        team: of all ranks.
        grid: where this one is among them.
        group: of the twins alone.
        name: of these sums, for the store.

    Attributes:
        size: number of twins.
        group: of them alone.
        wait_s: seconds that this rank has waited for sums.
    """

    def __init__(self, team: Team, grid: Grid, group: dist.ProcessGroup, name: str) -> None:
        self.wait_s = 0.0
        self._bytes_summed = 0
        self.size = grid.replicas
        self.group = group
        self._team = team
        self._grid = grid
        self._name = name
        self._others = [rank for rank in grid.twins(grid.stage) if rank != grid.rank]
        self._begun = 0

    @property
    def bytes_sent(self) -> int:
        """That an all-reduce round a ring has sent from this rank so far."""
        return round(2 * (self.size - 1) / self.size * self._bytes_summed)

    def sum(self, tensors: Sequence[Tensor], what: str) -> Sum:
        """Begin to replace ``tensors``, dense ones, by their sums over the twins, all of which do the same.

        Args:
            what: for messages, as ``"average the gradients of module 2"``.
        """
        self._begun += 1
        self._bytes_summed += sum(tensor.nbytes for tensor in tensors)
        through_host = bool(tensors) and tensors[0].is_cuda and dist.get_backend(self.group) == dist.Backend.GLOO
        summed = [tensor.cpu() for tensor in tensors] if through_host else list(tensors)
        works = []
        for dtype in dict.fromkeys(tensor.dtype for tensor in summed):
            with _coalescing_manager(group=self.group, async_ops=True) as under_way:
                for tensor in summed:
                    if tensor.dtype == dtype:
                        dist.all_reduce(tensor, group=self.group)
            works += under_way.works
        return Sum(self, works, tensors, summed, what, self._begun)

    def largest(self, number: int, what: str) -> int:
        """The largest ``number`` of any twin; group: on the host."""
        box = torch.tensor([number])
        self._begun += 1
        work = dist.all_reduce(box, dist.ReduceOp.MAX, self.group, async_op=True)
        assert work is not None
        Sum(self, [work], [box], [box], what, self._begun).wait()
        return int(box)

    def begin_alike(self, tensors: Sequence[Tensor]) -> None:
        """Let every twin begin with the values that the first replica has, as DistributedDataParallel does."""
        first = self._grid.twins(self._grid.stage)[0]
        for tensor in tensors:
            whole = tensor.contiguous()
            moved = whole.cpu() if dist.get_backend(self.group) == dist.Backend.GLOO else whole
            work = dist.broadcast(moved, first, self.group, async_op=True)
            assert work is not None
            self._begun += 1
            Sum(self, [work], [], [], "begin with the same weights", self._begun).wait()
            tensor.copy_(moved)

    def await_over(self, over: Callable[[float], bool], what: str, number: int) -> None:
        """Wait on the host for the ``number``-th sum of this rank. Raises DeadlineExceeded, PeerLost.

        Args:
            over: whether it is over; blocks for so many seconds or less. It may raise RuntimeError.
        """
        rank, begun = self._grid.rank, time.monotonic()
        late = self._others[:1]

        def look(seconds: float) -> None:
            if over(min(seconds, LOOK_S)):
                return
            self._team.set(Key.SUMMED(what=self._name, rank=rank), str(number))
            late[:] = [other for other in self._others if self._count(other) < number] or late
            raise Empty

        def awaited() -> tuple[int, str]:
            return late[0], f"for rank {late[0]} (replica {late[0] // self._grid.stages}) to {what}"

        def too_late(waited_s: float, verdict: str) -> DeadlineExceeded:
            return DeadlineExceeded(f"rank {rank} has waited {waited_s:g} s {awaited()[1]}; {verdict}")

        try:
            self._team.wait(look, awaited, too_late)
        except RuntimeError as error:
            if isinstance(error, dist.DistStoreError):
                raise
            cause = str(error).splitlines()[0][:200]
            raise PeerLost(-1, f"rank {rank} lost a replica while it waited to {what} ({cause})") from error
        finally:
            self.wait_s += time.monotonic() - begun

    def _count(self, rank: int) -> int:
        """The sum that a twin has last said it waits for; one that computes says nothing."""
        key = Key.SUMMED(what=self._name, rank=rank)
        return int(self._team.get([key])[0]) if self._team.has(key) else 0


class Sum:
    """A sum on its way. ``wait`` once."""

    def __init__(
        self, twins: Twins, works: Sequence[dist.Work], targets: Sequence[Tensor], summed: Sequence[Tensor],
        what: str, number: int,
    ) -> None:
        self._twins = twins
        self._works = works
        self._targets = targets
        self._summed = summed
        self._what = what
        self._number = number
        self._reached: torch.cuda.Event | None = None

    def wait(self) -> None:
        """The tensors hold their sums now; on a GPU for the current stream. Raises DeadlineExceeded, PeerLost."""
        on_host = dist.get_backend(self._twins.group) == dist.Backend.GLOO
        for work in self._works:
            if on_host:
                self._twins.await_over(_over_on_host(work), self._what, self._number)
            else:
                work.wait()
        for target, summed in zip(self._targets, self._summed, strict=True):
            if target is not summed:
                target.copy_(summed)
        if not on_host:
            self._reached = torch.cuda.current_stream().record_event()
        self._works = self._targets = self._summed = ()  # others may use their memory

    def settle(self) -> None:
        """After :meth:`wait`: block until the device has come past it too. Raises DeadlineExceeded, PeerLost."""
        if self._reached is not None:
            self._twins.await_over(partial(_passed, self._reached), self._what, self._number)
            self._reached = None


def _over_on_host(work: dist.Work) -> Callable[[float], bool]:
    """Whether it is over after so many seconds. Raises RuntimeError."""
    done = threading.Event()
    work.get_future().add_done_callback(lambda _: done.set())

    def over(seconds: float) -> bool:
        if not done.wait(seconds):
            return False
        work.wait()
        return True

    return over


def _passed(event: torch.cuda.Event, seconds: float) -> bool:
    """Whether the device has come to an event after so many seconds."""
    end, pause = time.monotonic() + seconds, SHORTEST_POLL_S
    while not event.query():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_POLL_S)
    return True
