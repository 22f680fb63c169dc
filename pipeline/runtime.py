"""From the launcher's environment to a working rank: device, threads, groups, failure desk, orderly end.

    torchrun, srun: WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT      plain python: none of these
          |                                                                           |
    store (of the launcher, or on rank 0) -> desk -> device -> process groups         desk -> device
          |                                                                           |
    with Runtime() as runtime: ...                                                    the same code, no group

Waits for peers have one deadline. A wait on an edge that outlasts it goes on while the rank at the root of it moves
(see heartbeat); one in a collective, or for all ranks to finish, ends with an error that names the absent ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from pipeline.attempt import Job, launcher_serves
from pipeline.errors import ConfigError, DeadlineExceeded, PeerLost
from pipeline.failure import FailureDesk
from pipeline.heartbeat import EVERYBODY, Heartbeat

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
DEVICES = ("auto", "cpu", "cuda", "cuda-shared")


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
    count = threads or max(1, len(os.sched_getaffinity(0)) // local_world_size)
    torch.set_num_threads(count)
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(
            RuntimeError
        ):  # refused once parallel work has started (embedded in other code)
            torch.set_num_interop_threads(1)
    return count


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
        rank, world_size, local_rank, local_world_size: from the launcher; 0, 1, 0, 1 for one process.
        device: compute device. backend: "nccl" or "gloo", for the edges.
        threads: intra-op threads.
        store: key-value store of this run in this attempt, None for one process.
        job_store: key-value store of this run in every attempt of the job: restarted workers find in it what their
            predecessors have left, where the launcher serves it (torchrun). None for one process.
        control: gloo group of all ranks for metrics and objects (timeout = deadline), None for one process.
        desk: the FailureDesk. An exception that leaves the ``with`` block goes there and ends all ranks.

    With ``graceful`` a signal only asks for a stop (see :meth:`FailureDesk.stop_gracefully`).
    """

    def __init__(
        self,
        device: str = "auto",
        threads: int = 0,
        deadline_s: float = 60.0,
        run_dir: Path | None = None,
        graceful: bool = False,
    ) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.deadline_s = deadline_s
        self.run_dir = run_dir
        self._graceful = graceful
        self.store: dist.Store | None = None
        self.job_store: dist.Store | None = None
        self.control: dist.ProcessGroup | None = None
        self._device_request = device
        self._threads_request = threads
        self._controls = 0

    def __enter__(self) -> Runtime:
        """Raises nothing: what fails here is reported by the desk, once for the whole job."""
        self.threads = set_threads(self._threads_request, self.local_world_size)
        self.desk = FailureDesk(None, self.rank, self.world_size, run_dir=self.run_dir)
        try:
            if self.world_size > 1:
                self.store, self.job_store = _job(self.rank, self.world_size).next_run(self.deadline_s)
                self.desk = FailureDesk(
                    self.store,
                    self.rank,
                    self.world_size,
                    run_dir=self.run_dir,
                    store_host=self._store_host(),
                    deadline_s=self.deadline_s,
                )
            if self._graceful:
                self.desk.stop_gracefully()
            self.device, self.backend = choose_device(
                self._device_request, self.local_rank, self.local_world_size
            )
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            else:
                keep_freed_memory()
            if self.store is not None:
                self._init_groups(self.store)
        except BaseException as exc:
            self.desk.report(exc)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is not None and not (isinstance(exc, SystemExit) and exc.code in (None, 0)):
            self.desk.report(exc)
        try:
            self.close()
        except Exception as late:
            self.desk.report(late)

    @property
    def patience(self) -> Heartbeat:
        """What the ends of the edges tell of their waits, and ask whether to go on waiting."""
        return self.desk.heart

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's ``value`` (picklable), by rank, on rank 0; None elsewhere. Collective.

        Raises DeadlineExceeded naming the ranks that did not come, PeerLost. So do ``broadcast`` and
        ``barrier``.
        """
        if self.control is None:
            return [value]
        values = [None] * self.world_size if self.rank == 0 else None
        with self._collective("gather"):
            dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value`` (picklable) on every rank. Collective."""
        if self.control is None:
            return value
        box = [value]
        with self._collective("broadcast"):
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank is here. Collective."""
        if self.control is not None:
            with self._collective("barrier"):
                dist.barrier(group=self.control)

    def close(self) -> None:
        """Leave together: a rank that goes while a peer still waits for it would look like a failure."""
        if self.store is not None:
            self._meet(self.store, "closing")
            dist.destroy_process_group()
            self.control = None
        self.desk.close()
        if self.store is not None and self._store_host() == self.rank:
            # The server of the store ends with this process: the others must be done with it.
            self._wait_keys(self.store, [f"left/{rank}" for rank in range(self.world_size)], "leave")
        self.store = None

    def _store_host(self) -> int | None:
        """The rank that serves the store, None if the launcher does (torchrun)."""
        return None if launcher_serves() else 0

    def _init_groups(self, store: dist.Store) -> None:
        timeout = timedelta(seconds=self.deadline_s)
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore("groups", store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=self.device if self.backend == "nccl" else None,
        )
        self.control = dist.new_group(backend="gloo", timeout=timeout)

    @contextlib.contextmanager
    def _collective(self, name: str) -> Iterator[None]:
        """Turn gloo's errors into ours; a counter per rank in the store tells afterwards who did not come."""
        self._controls += 1
        self.store.set(f"control/{self.rank}", str(self._controls))
        self.patience.begin(EVERYBODY, f"for all ranks in a {name}")
        try:
            yield
        except RuntimeError as exc:
            counts = [self._count(rank) for rank in range(self.world_size)]
            absent = [rank for rank, count in enumerate(counts) if count < self._controls]
            who = f"rank {', '.join(map(str, absent))}" if absent else "a peer"
            if "timed out" in str(exc).lower():
                raise DeadlineExceeded(
                    f"rank {self.rank} has waited {self.deadline_s:g} s in a {name} for {who}; slow, hung or "
                    "stopped - raise runtime.deadline_s if the step really takes that long"
                    + "".join(f"; {self.patience.saying(rank)}" for rank in absent)
                ) from exc
            peer = absent[0] if absent else -1
            raise PeerLost(peer, f"rank {self.rank} was in a {name} when it lost {who}") from exc
        finally:
            self.patience.end()

    def _count(self, rank: int) -> int:
        key = f"control/{rank}"
        return int(self.store.get(key)) if self.store.check([key]) else 0

    def _meet(self, store: dist.Store, name: str) -> None:
        keys = [f"{name}/{rank}" for rank in range(self.world_size)]
        store.set(keys[self.rank], "1")
        self._wait_keys(store, keys, "finish")

    def _wait_keys(self, store: dist.Store, keys: list[str], verb: str) -> None:
        end = time.monotonic() + self.deadline_s
        self.patience.begin(EVERYBODY, f"for all ranks to {verb}")
        while not store.check(keys):  # store.wait would block in C++, and print warnings when it times out
            if time.monotonic() > end:
                absent = ", ".join(key.rpartition("/")[2] for key in keys if not store.check([key]))
                raise DeadlineExceeded(
                    f"rank {self.rank} has waited {self.deadline_s:g} s for rank {absent} to {verb}"
                )
            time.sleep(0.02)
        self.patience.end()
