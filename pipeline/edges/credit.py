"""How a message crosses an edge whose payload a device carries (NCCL): header by gloo, payload only with credit.

A transfer of NCCL is a kernel that spins on the device until its other half has come. One that is posted long before
its message makes whatever waits for the whole device wait for that message too: a synchronisation, a cudaFree, the
first launch of a kernel. So neither half is launched before both ranks stand ready, which they tell each other on the
host:

    sending rank                                          receiving rank
    main      pack a slot                                 release a slot                               main
    gate      device has filled it?                       device has read it?                          gate
              |                                           |
              header, isend ------------- gloo ---------- header, irecv    (one for every free slot: the credit)
              |                                           |
    drain     header taken: there is credit               header is here, and valid                    listen
              |                                           |
              payload, isend ============ NCCL ========== payload, irecv
              |                                           |
              over: the slot is free                      over: the message is ready                   take()

A send of gloo is a rendezvous: it is over only when the peer has posted a receive for it, so the posted receive of a
header is the credit and needs no message of its own. Nothing that the device is still to do lies between a header and
its payload on either side (the gates have waited for that), so the two kernels are launched within the time that a
small message takes, and are gone when the payload has crossed. No header is read back from the device. A message
without fields, as at the end of an epoch or of the stream, has no payload.

Where gloo carries all (CPU; ranks that share a GPU) a posted receive costs nothing and is the credit itself: header and
fields are one message.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

SHORTEST_LOOK_S, LONGEST_LOOK_S = 20e-6, 1e-3
"""Between two looks at a transfer under way, first and last. Nothing on the device waits for one: what is queued behind
such a wait would stand between the peer and the other half of another transfer."""


class Payload:
    """One direction of payloads between two ranks, one at a time. From the thread of an end; it blocks.

    Args:
        group: of the two ranks alone, of a backend whose Work knows when it is over (NCCL).
        peer: the other rank.
        device: where the buffers are.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, device: torch.device) -> None:
        self._group = group
        self._peer = peer
        # NCCL begins after what is queued on the current stream: on one of its own that is nothing.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, buffer: torch.Tensor) -> None:
        """Send ``buffer``, uint8 (n,). Raises RuntimeError."""
        with self._on_stream():
            self._finish(dist.isend(buffer, self._peer, group=self._group))

    def receive(self, buffer: torch.Tensor) -> None:
        """Fill ``buffer``, uint8 (n,); any stream may use it afterwards. Raises RuntimeError."""
        with self._on_stream():
            self._finish(dist.irecv(buffer, self._peer, group=self._group))

    def _on_stream(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _finish(self, work: dist.Work | None) -> None:
        assert work is not None  # this rank is in the group
        pause = SHORTEST_LOOK_S
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_LOOK_S)
        work.wait()  # it is over: this lets go of the buffer, or raises what went wrong


class Gate:
    """Does things in their order, each when the device has come so far, in ``thread``, to be started by the owner.

    Args:
        name: of the thread.
        begin: called first in the thread.
        failed: told what went wrong; nothing is done after that.
    """

    def __init__(self, name: str, begin: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        self._waiting: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._begin = begin
        self._failed = failed
        self.thread = threading.Thread(target=self._pass, name=name, daemon=True)

    def after(self, ready: Callable[[], None], act: Callable[[], None]) -> None:
        """Call ``act`` when ``ready``, which may block, has returned. From any thread."""
        self._waiting.put((ready, act))

    def close(self) -> None:
        """End the thread when all that waits has passed."""
        self._waiting.put(None)

    def _pass(self) -> None:
        try:
            self._begin()
            while (item := self._waiting.get()) is not None:
                ready, act = item
                ready()
                act()
        except Exception as error:
            self._failed(error)
