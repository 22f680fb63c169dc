"""From the launcher's environment to a working rank: device, threads, groups, failures, orderly end.

    torchrun, srun: WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT      plain python: none of these
          |                                                                           |
    store (of the launcher, or on rank 0) -> team -> device -> process groups         team -> device
          |                                                                           |
    with Runtime() as runtime: ...                                                    the same code, no group

Waits for peers have one deadline. One that outlasts it goes on while the rank at the root of it moves (see heartbeat);
else it ends with an error that names the absent ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import os
import signal
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

from pipeline.base.errors import ConfigError, DeadlineExceeded, warn
from pipeline.ranks import launcher
from pipeline.ranks.attempt import GRACE_S, Job, launcher_serves
from pipeline.ranks.failure import FailureReporter
from pipeline.ranks.keys import Key
from pipeline.ranks.nccl import leave_failures_to_us
from pipeline.ranks.patience import within
from pipeline.ranks.resources import usable_cores
from pipeline.ranks.start_up import take_noted
from pipeline.ranks.team import Team

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
DEVICES = ("auto", "cpu", "cuda", "cuda-shared")
T = TypeVar("T")


def choose_device(request: str, local_rank: int, local_world_size: int) -> tuple[torch.device, str]:
    """Return the compute device of this rank and the backend ("nccl" or "gloo") of its edges.

    auto: one GPU per rank if there are enough, else CPU. cuda: one GPU per rank or ConfigError. cuda-shared:
    the ranks of a machine share its GPUs, messages go through pinned host memory (NCCL refuses two ranks on
    one GPU).
    """
    if request not in DEVICES:
        raise ConfigError(f"runtime.device: unknown device {request!r}; valid: {', '.join(DEVICES)}")
    gpus = torch.cuda.device_count()
    enough = gpus >= local_world_size and dist.is_nccl_available()
    if request == "cuda" and not enough:
        raise ConfigError(
            f"runtime.device = 'cuda' needs NCCL and {local_world_size} GPUs on this machine, one per rank; "
            f"found {gpus}: start fewer ranks, or use 'cuda-shared' (ranks share a GPU, slower) or 'cpu'"
        )
    if request == "cuda-shared":
        if gpus == 0:
            raise ConfigError(
                "runtime.device = 'cuda-shared' needs a GPU on this machine, found none: use 'cpu'"
            )
        return torch.device("cuda", local_rank % gpus), "gloo"
    if request == "cuda" or (request == "auto" and enough and gpus > 0):
        return torch.device("cuda", local_rank), "nccl"
    return torch.device("cpu"), "gloo"


def ranks_per_device(request: str, device: torch.device, local_world_size: int) -> int:
    """How many ranks of a machine share the memory of a device that :func:`choose_device` chose for ``request``."""
    if device.type == "cpu":
        return local_world_size
    return -(-local_world_size // torch.cuda.device_count()) if request == "cuda-shared" else 1


def set_threads(threads: int, local_world_size: int) -> int:
    """Set the number of intra-op threads (0: this machine's cores divided among its ranks) and return it.

    One inter-op thread: a stage is sequential, and idle pools cost start-up time. Call before any tensor
    work.
    """
    count = threads or max(1, usable_cores() // local_world_size)
    torch.set_num_threads(count)
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(
            RuntimeError
        ):  # refused once parallel work has started (embedded in other code)
            torch.set_num_interop_threads(1)
    return count


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """Whatever changes the number of intra-op threads in it has done so for as long as it lasts."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where the C library is glibc.

    By default every large tensor is mapped anew from the system and given back: each step then pays a page fault for
    every 4 KiB of activations, 3 to 10 % of its time on a CPU. What is freed is used again, so memory stays flat.
    """
    libc = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(libc), "mallopt", None) if libc else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


@functools.cache
def _job(rank: int, world_size: int) -> Job:
    """The job of this process: one for all its runs."""
    return Job(rank, world_size)


class Runtime:
    """Context manager around everything a rank does.

    Attributes:
        team: all ranks of the run, and this one among them.
        local_rank, local_world_size: which of how many on its machine, from the launcher; 0, 1 for one process.
        device: compute device. backend: "nccl" or "gloo", for the edges.
        threads: intra-op threads.
        failures: reports them. An exception that leaves the ``with`` block goes there and ends all ranks.

    Nothing before the first step takes longer than ``setup_deadline_s`` (or ``deadline_s``, if that is more), nothing
    after it longer than ``deadline_s``. With ``graceful`` a signal only asks for a stop (see
    :meth:`FailureReporter.stop_gracefully`).
    """

    def __init__(
        self,
        device: str = "auto",
        threads: int = 0,
        deadline_s: float = 60.0,
        setup_deadline_s: float = 0.0,
        run_dir: Path | None = None,
        graceful: bool = False,
    ) -> None:
        self._size = int(os.environ.get("WORLD_SIZE", "1"))
        self._rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self._rank))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self._size))
        self.failures = FailureReporter(self._rank, self._size, deadline_s, setup_deadline_s, run_dir)
        self._deadline_s = deadline_s
        self._graceful = graceful
        self._device_request = device
        self._threads_request = threads

    def __enter__(self) -> Runtime:
        """Raises nothing: what fails here is reported, once for the whole job."""
        self.threads = set_threads(self._threads_request, self.local_world_size)
        if self._size > 1 and launcher.refused_before():
            os._exit(1)  # what cannot change has been said by the attempt before
        launcher.register()
        try:
            store, memory = _job(self._rank, self._size).next_run(self._deadline_s)
            self.team = Team(self._rank, self._size, store, memory, self._deadline_s, self.failures.heart)
            self.failures.join(self.team, self._store_host())
            if self._graceful:
                self.failures.stop_gracefully()
            self.device, self.backend = choose_device(
                self._device_request, self.local_rank, self.local_world_size
            )
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            else:
                keep_freed_memory()
            if self._size > 1:
                self._init_groups()
        except BaseException as exc:
            if isinstance(exc, DeadlineExceeded):
                self._stop_in_start_up()
            self.failures.report(exc)
        return self

    def _stop_in_start_up(self) -> None:
        """Where a signal has come meanwhile, the rank that is missing has got it too, before it could handle it."""
        noted = take_noted()
        if noted:
            if launcher.elected():
                what = f"{signal.Signals(noted[0]).name} on rank {self._rank}"
                print(f"localpipe: stopped by {what} before step 0; nothing was trained", flush=True)
            os._exit(0)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is not None and not (isinstance(exc, SystemExit) and exc.code in (None, 0)):
            self.failures.report(exc)
        try:
            self.close()
        except Exception as late:
            self.failures.report(late)

    def close(self) -> None:
        """Leave together: a rank that goes while a peer still waits for it would look like a failure."""
        team = self.team
        if team.size > 1:
            team.meet("the end", "finish")
            dist.destroy_process_group()
            team.group = None
        self.failures.close()
        if team.size > 1 and self._store_host() == team.rank:
            # The server of the store ends with this process: the others must be done with it. Without patience: what
            # told it of the others has ended with the reporter of failures.
            Team(team.rank, team.size, team.store, deadline_s=team.deadline_s).wait_for(team.each(Key.LEFT), "leave")

    def _store_host(self) -> int | None:
        """The rank that serves the store, None if the launcher does (torchrun)."""
        return None if launcher_serves() else 0

    def _init_groups(self) -> None:
        timeout = timedelta(seconds=self.team.deadline_s)
        if self.backend == "nccl":
            lines = leave_failures_to_us(os.environ, self.team.deadline_s)
            for line in lines if self.team.leads else ():
                warn(line)
        every = functools.partial(
            dist.init_process_group,
            self.backend,
            store=dist.PrefixStore(Key.GROUPS(), self.team.store),
            rank=self.team.rank,
            world_size=self.team.size,
            timeout=timeout,
            device_id=self.device if self.backend == "nccl" else None,
        )
        if self.backend == "nccl":
            every()  # in this thread, whose device is set
        else:
            self._reached(every)
        group = self._reached(functools.partial(dist.new_group, backend="gloo", timeout=timeout))
        assert isinstance(group, dist.ProcessGroup)  # this rank is in it
        self.team.group = group

    def _reached(self, connect: Callable[[], T]) -> T:
        """What ``connect`` returns, which opens gloo's connections. Where packets are lost, gloo tries for five times
        its timeout, in C++, and does not say what could be wrong.

        Raises:
            DeadlineExceeded: the other ranks, whom this one has met in the store, cannot be reached.
        """
        try:
            return within(self.team.deadline_s + GRACE_S, connect)
        except TimeoutError as error:
            interface = os.environ.get("GLOO_SOCKET_IFNAME") or f"that of the name {socket.gethostname()}"
            raise DeadlineExceeded(
                f"rank {self.team.rank} has waited {self.team.deadline_s:g} s for connections with the other ranks "
                f"(gloo, interface: {interface}): all ranks have met, so their network must be wrong; let all ports "
                "through between the machines (firewall), or choose the interface: GLOO_SOCKET_IFNAME"
            ) from error
