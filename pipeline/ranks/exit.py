"""The end of this process because of a failure, from whichever of its threads.

    lock -> election -> winner: the line, then no other process of this machine is left -+
                        losers: nothing -------------------------------------------------+-> os._exit
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from pipeline.base.errors import MARK
from pipeline.ranks import launcher
from pipeline.ranks.election import code_of_loser, elected
from pipeline.ranks.peers import WATCH_S, Peers
from pipeline.ranks.process import reap

GRACE_S = 2.0
"""Seconds that a rank which lost a peer waits for the peer's own report."""
LINGER_S = 3 * WATCH_S
"""Seconds that the store's host stays, for the others to read from it that the run has failed."""
LONGEST = 1000
"""Characters of a line."""


class Exit:
    """Ends this process: os._exit, since threads that wait in C++ would abort an orderly exit.

    Attributes:
        lock: held from the election to the end: nobody ends a winner before it has printed.
        before: called first, e.g. to restore the terminal; os._exit runs nothing else.
    """

    def __init__(self, peers: Peers) -> None:
        self.lock = threading.Lock()
        self.before: Callable[[], None] | None = None
        self._peers = peers

    def leave(self, code: int, line: str | Callable[[], str], refused: bool = False) -> NoReturn:
        """Stand for election, tell the line if elected, and end. Hold the lock.

        Args:
            line: called only by who is elected, where it does more than tell.
            refused: a restart would end in the same way.
        """
        if elected(self._peers, refused):
            text = MARK + " ".join((line if isinstance(line, str) else line()).split())[:LONGEST]
            os.write(2, f"{text}\n".encode())  # one write: lines of ranks do not mix
            launcher.tell(text, refused)
            self._reap()
            self._end(code)
        self.follow(code)

    def follow(self, code: int) -> NoReturn:
        """End in silence: another rank tells why. Hold the lock: not while this very process is the one that does."""
        self._end(code_of_loser(self._peers, code))

    def tidy_up(self) -> None:
        """What an exit would leave undone: a terminal to restore, text in buffers."""
        if self.before is not None:
            with contextlib.suppress(Exception):
                self.before()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    def _reap(self) -> None:
        """A peer that is stopped, or hangs in C code with the interpreter lock held, cannot end itself."""
        known = launcher.siblings()  # also those that have not come to the store
        self._peers.dead()  # reads the processes not known yet
        known |= self._peers.known
        reap([peer for peer in known.values() if peer.host == self._peers.me.host])

    def _end(self, code: int) -> NoReturn:
        self.tidy_up()
        with contextlib.suppress(Exception):  # of a process that has forked itself, they may be its parent's
            for worker in multiprocessing.active_children():
                if worker.is_alive():
                    worker.kill()  # a loader's workers would outlive this process by seconds
        if self._peers.store_host == self._peers.rank:
            time.sleep(LINGER_S)
        os._exit(code)
