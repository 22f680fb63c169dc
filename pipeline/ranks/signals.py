"""SIGTERM and SIGINT of this rank: the end at once, or a request to stop in order.

    one process:        signal -> Python's handler -> KeyboardInterrupt, or a request
    several processes:  signal -> C half of the handler -> pipe -> sentinel thread

Why a pipe: the launcher sends SIGTERM to the others about 0.1 s after the first process ends, and a Python signal
handler cannot run while the main thread sits in C++ (a collective, a group being built). The C half of Python's handler
runs at once in any thread and writes the signal number to a pipe (``signal.set_wakeup_fd``); the sentinel reads it.
Blocking SIGTERM with a signal mask would do as well, but child processes inherit a mask (data loader workers could not
be terminated), and threads started before would still die silently.

A run can ask that a signal does not end it at once (``stop_gracefully``): the first one is then only noted. Any rank
can get it, rank 0 is asked:

    rank 2, sentinel:  SIGTERM -> store: stop = "SIGTERM on rank 2"        rank 0, sentinel: stop? -> signals.stop
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from functools import partial

from pipeline.ranks.forks import SIGNALS, SignalOwner, follow_forks
from pipeline.ranks.start_up import take_noted

END = 0
"""What ``wait`` returns for the end that ``end_wait`` asks for; no signal has this number."""


class Signals(SignalOwner):
    """Use it in the main thread; only ``wait`` is called in another one.

    Args:
        rank: this one.
        alone: whether it is the only process, so that the handlers themselves act.

    Attributes:
        stop: which signal asks for a stop, e.g. ``"SIGTERM on rank 2"``; None: none does. Of a signal to another rank
            only rank 0 knows.
    """

    def __init__(self, rank: int, alone: bool) -> None:
        self.graceful = False
        self.stop: str | None = None
        self._rank = rank
        self._alone = alone
        self._interrupts = 0
        self._early: list[int] = []  # before this rank could handle them
        self._bell = self._wake = -1  # the two ends of the pipe
        self._restore: list[Callable[[], object]] = []

    def handle(self) -> None:
        """From now on SIGTERM and SIGINT come here."""
        self._early += take_noted()
        for number in SIGNALS:
            previous = signal.signal(number, self._on_signal)
            self._restore.append(partial(signal.signal, number, previous))
        follow_forks()

    def handle_by_pipe(self) -> None:
        """The same, for a thread that waits for them."""
        self._bell, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        previous_fd = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._restore.append(partial(signal.set_wakeup_fd, previous_fd))
        self.handle()
        self._restore.append(partial(os.close, self._wake))

    def wait(self, seconds: float) -> int | None:
        """The number of a signal that means the end now, END, or None if neither comes in so many seconds."""
        rang = select.select([self._bell], [], [], seconds)[0]
        rung = os.read(self._bell, 4096) if rang else b""
        # Python writes every signal that it has a handler for; SIGCHLD, SIGUSR1 are the business of their handlers.
        number = next((byte for byte in rung if byte in SIGNALS and not self._noted(byte)), None)
        if number is None and END in rung:
            os.close(self._bell)
            return END
        return number

    def end_wait(self) -> None:
        """Let the thread that waits get END."""
        os.write(self._wake, bytes([END]))

    def stop_gracefully(self) -> None:
        """From now on SIGTERM and SIGINT only ask for a stop, except that a second SIGINT ends this rank at once. With
        one process this needs the main thread; in another one signals stay as they are."""
        self.graceful = True
        if self._alone and threading.current_thread() is threading.main_thread():
            self.handle()
        for number in self._early:
            self._noted(number)

    def ignore_workers(self) -> None:
        """A worker of a loader that ends from now on raises nothing here: torch's handler would cut a report short."""
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._restore.append(partial(signal.signal, signal.SIGCHLD, previous))

    def restore(self) -> None:
        """Signals mean again what they meant before."""
        for restore in self._restore:
            restore()
        self._restore.clear()

    def _on_signal(self, number: int, frame: object) -> None:
        """Python half of the handlers. With several processes the sentinel acts on the byte in the pipe."""
        if self._alone and not self._noted(number):
            raise KeyboardInterrupt

    def _noted(self, number: int) -> bool:
        """Take a signal for a request to stop; False: it means now."""
        again = self._interrupts > 0  # also SIGTERM: torchrun passes on a second ctrl-C as that
        self._interrupts += number == signal.SIGINT
        if not self.graceful or again:
            return False
        self.stop = self.stop or f"{signal.Signals(number).name} on rank {self._rank}"
        return True
