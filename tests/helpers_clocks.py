"""Which of two uses of a buffer comes first, on the host's threads and the device's streams: vector clocks.

    thread    launches on a stream                      the stream goes on from where the thread is
    stream    event recorded --> waited for by a stream, or by a thread: it goes on from there as well
    thread    puts into a queue --> another takes it; notifies --> another wakes; starts, joins

What none of these orders may happen in any order, whatever happens in the run that is looked at: so a use that another
does not follow by any such way is reported, even if all goes well. Source: Lamport, "Time, clocks, and the ordering of
events in a distributed system", 1978.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

Clock = dict[str, int]
_numbers = itertools.count()
_here = threading.local()


def joined(one: Clock, other: Clock) -> Clock:
    """The clock of what comes after both."""
    return one | {name: max(tick, one.get(name, 0)) for name, tick in other.items()}


class Thread:
    """The clock of a host thread."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = f"thread {name} #{next(_numbers)}"
        self.clock = clock

    def follow(self, clock: Clock) -> None:
        """Whatever this thread does from now on comes after ``clock``."""
        self.clock = joined(self.clock, clock)

    def tick(self) -> Clock:
        """One thing that it does."""
        self.clock = self.clock | {self.name: self.clock.get(self.name, 0) + 1}
        return self.clock


def this_thread() -> Thread:
    """The clock of the calling thread."""
    if not hasattr(_here, "thread"):
        _here.thread = Thread("main", {})  # or one that is just being started
    return _here.thread


class Stream:
    """Stands in for ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0, name: str = "side stream") -> None:
        self.name = f"{name} #{next(_numbers)}"
        self.ticks = 0
        """How many things it was given."""
        self.after: Clock = {}
        """What its next one comes after, on others."""
        self._launched_from: Clock = {}

    def launch(self) -> None:
        """One thing that it does, launched by the calling thread."""
        here = this_thread().clock
        if here is not self._launched_from:
            self.after, self._launched_from = joined(self.after, here), here
        self.ticks += 1

    @property
    def clock(self) -> Clock:
        """Of all that it was given so far."""
        return self.after | {self.name: self.ticks}

    def wait_event(self, event: Event) -> None:
        self.after = joined(self.after, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        self.after = joined(self.after, stream.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        this_thread().follow(self.clock)


class Event:
    """Stands in for ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.clock: Clock = {}
        self.host_s = 0.0
        self._timing = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        self.clock, self.host_s = joined(stream.clock, this_thread().clock), time.perf_counter()

    def synchronize(self) -> None:
        this_thread().follow(self.clock)

    def query(self) -> bool:
        if not self._timing:  # what only measures must order nothing: whether it has passed is luck
            self.synchronize()
        return True

    def elapsed_time(self, later: Event) -> float:
        return (later.host_s - self.host_s) * 1e3


DEFAULT = Stream(name="default stream")


def current_stream(device: Any = None) -> Stream:
    """Of the calling thread."""
    return getattr(_here, "stream", DEFAULT)


@contextmanager
def on_stream(stream: Stream | None) -> Any:
    """Stands in for ``torch.cuda.stream``."""
    before = current_stream()
    _here.stream = stream or before
    try:
        yield
    finally:
        _here.stream = before


class _Queue(queue.SimpleQueue):
    """What is taken out comes after what was done before it was put in."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put((this_thread().clock, item))

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        clock, item = super().get(block, timeout)
        this_thread().follow(clock)
        return item

    def get_nowait(self) -> Any:
        return self.get(block=False)


class _Condition(threading.Condition):
    """Whoever has the lock comes after all that had it before."""

    clock: Clock = {}

    def __enter__(self) -> Any:
        entered = super().__enter__()
        this_thread().follow(self.clock)
        return entered

    def __exit__(self, *error: Any) -> Any:
        self.clock = joined(self.clock, this_thread().clock)
        return super().__exit__(*error)

    def wait(self, timeout: float | None = None) -> bool:
        self.clock = joined(self.clock, this_thread().clock)
        woken = super().wait(timeout)
        this_thread().follow(self.clock)
        return woken


@contextmanager
def followed_threads(around: Callable[[], Any]) -> Any:
    """Inside, new threads, queues and conditions carry clocks; what a new thread does is done within ``around()``."""
    start, join = threading.Thread.start, threading.Thread.join

    def started(thread: threading.Thread) -> None:
        run, begun = thread.run, this_thread().tick()

        def within() -> None:
            _here.thread = Thread(thread.name, begun)
            thread._clock = _here.thread  # type: ignore[attr-defined]
            with around():
                run()

        thread.run = within  # type: ignore[method-assign]
        start(thread)

    def followed(thread: threading.Thread, timeout: float | None = None) -> None:
        join(thread, timeout)
        if not thread.is_alive() and hasattr(thread, "_clock"):
            this_thread().follow(thread._clock.clock)

    with ExitStack() as patches:
        patches.enter_context(patch.object(threading.Thread, "start", started))
        patches.enter_context(patch.object(threading.Thread, "join", followed))
        patches.enter_context(patch.object(queue, "SimpleQueue", _Queue))
        patches.enter_context(patch.object(threading, "Condition", _Condition))
        yield


class Uses:
    """Of one buffer: the last write, and the reads since."""

    def __init__(self) -> None:
        self.write: tuple[str, int, str] | None = None
        self.reads: dict[str, tuple[int, str]] = {}

    def add(self, who: str, tick: int, after: Clock, writes: bool, what: str) -> str | None:
        """One more use, the ``tick``-th thing that a thread or stream does, which comes ``after`` what others did.
        Returns what is wrong: an earlier use that it does not follow."""
        wrong = None
        before = [(name, *use) for name, use in self.reads.items()] if writes else []
        for name, then, done in [*before, self.write] if self.write is not None else before:
            on_host = name.startswith("thread") and who.startswith("thread")  # of which this knows too little
            if name != who and after.get(name, 0) < then and not on_host:
                wrong = f"{what} ({'writes' if writes else 'reads'}) on the {who} does not follow {done} on the {name}"
        if writes:
            self.write, self.reads = (who, tick, what), {}
        else:
            self.reads[who] = (tick, what)
        return wrong
