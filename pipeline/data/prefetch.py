"""Work done ahead of its consumer by one background thread; for batches on a GPU, on a stream of its own.

    consumer's thread     item 0..2 | computes with value 0 | item 3 | computes with value 1 | item 4 | ...
    background thread        value 0   value 1   value 2                value 3                ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.base.flow import named
from pipeline.stage.inlet import Batch

Item = TypeVar("Item")
Value = TypeVar("Value")
AHEAD = 2


def prefetched(
    make: Callable[[Item], Value], items: Iterable[Item], ahead: int = AHEAD
) -> Generator[Value, None, None]:
    """``make(item)`` for every item, up to ``ahead`` of them made in a thread before they are asked for.

    The items themselves are taken in the consumer's thread, within its ``next``; the thread starts with the first one.
    An exception of ``make`` or of ``items`` is raised here, after the values before it. When the consumer stops early
    or closes the generator, the thread is waited for: none is left.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    futures = _submitted(pool, make, items)
    waiting: deque[Future[Value]] = deque()
    try:
        while True:
            waiting.extend(islice(futures, ahead + 1 - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(
    pool: ThreadPoolExecutor, make: Callable[[Item], Value], items: Iterable[Item]
) -> Iterator[Future[Value]]:
    try:
        for item in items:
            yield pool.submit(make, item)
    except Exception as error:  # the consumer raises it when it comes to this place
        failed: Future[Value] = Future()
        failed.set_exception(error)
        yield failed


def on_device(
    make: Callable[[Item], Batch], items: Iterable[Item], device: torch.device, ahead: int = AHEAD
) -> Generator[Batch, None, None]:
    """:func:`prefetched` for batches on ``device``, which ``make`` copies there and computes on.

    On a GPU that happens on a stream beside the one that the network computes on, which waits for a batch only when it
    is handed out. An item that lies on the GPU is used only once what was queued before it was taken is done.
    """
    if device.type != "cuda":
        with closing(prefetched(make, items, ahead)) as batches:
            yield from batches
        return
    stream = torch.cuda.Stream(device)

    def taken() -> Iterator[tuple[Item, torch.cuda.Event]]:
        for item in items:
            yield item, torch.cuda.current_stream(device).record_event()

    def make_beside(entry: tuple[Item, torch.cuda.Event]) -> tuple[Batch, torch.cuda.Event]:
        item, ready = entry
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            return make(item), stream.record_event()

    with closing(prefetched(make_beside, taken(), ahead)) as pairs:
        for batch, made in pairs:
            computing = torch.cuda.current_stream(device)
            computing.wait_event(made)
            for tensor in (*named(batch.x).values(), batch.labels, batch.image):
                if tensor is not None:
                    tensor.record_stream(computing)  # its memory is the side stream's, but not before it is used
            yield batch


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, for the current stream; to a GPU from pinned memory, so that the copy runs beside
    computing."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(device))  # whoever made it may let go of it at once
    return tensor.to(device)
