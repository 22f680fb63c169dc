"""Signals that come before a run can handle them: torch alone takes seconds to import.

    process starts -> StartUp notes signals -> imports -> the ranks find each other -> the run handles signals, also
                                                                                       the noted ones: no step is done
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial

from pipeline.ranks.forks import SIGNALS, SignalOwner, follow_forks


class StartUp(SignalOwner):
    """Notes the signals of a process that is to train.

    Attributes:
        noted: SIGTERM and SIGINT that have come and that no run has taken yet, in this order.
    """

    def __init__(self) -> None:
        self.noted: list[int] = []
        self._restore: list[Callable[[], object]] = []

    def begin(self) -> None:
        """From now on one signal is noted; a second one after ctrl-C raises KeyboardInterrupt (torchrun passes on a
        second ctrl-C as SIGTERM). Outside of the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            previous = signal.signal(number, self._on_signal)
            self._restore.append(partial(signal.signal, number, previous))
        follow_forks()

    def end(self) -> None:
        """Signals mean again what they meant before."""
        for restore in self._restore:
            restore()
        self._restore.clear()

    def _on_signal(self, number: int, frame: object) -> None:
        if signal.SIGINT in self.noted:
            raise KeyboardInterrupt
        self.noted.append(number)


def take_noted() -> list[int]:
    """The signals that have been noted since the process started; who takes them acts on them."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not isinstance(owner, StartUp):
        return []
    noted, owner.noted = owner.noted, []
    return noted
