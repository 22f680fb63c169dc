"""Work done ahead of its consumer by one background thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
AHEAD = 2
POLL_S = 0.05


def prefetched(make: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    """``make(item)`` for every item, up to AHEAD of them made ahead in a thread.

    The thread starts with the first ``next``. An exception in ``make`` is raised here, after the values
    before it. When the consumer stops early or closes the generator, the thread is waited for: none is left.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=POLL_S)
                return

    def work() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                put((make(item), None, False))
            put((None, None, True))
        except BaseException as error:  # handed to the consumer, who raises it
            put((None, error, True))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value, error, last = ready.get()
            if error is not None:
                raise error
            if last:
                return
            assert value is not None
            yield value
    finally:
        stopped.set()
        thread.join()
