"""Two threads of a rank that watch what its main thread cannot see while it computes or waits.

    sentinel:   SIGTERM, SIGINT; every 0.5 s: failure key in the store? a peer's process gone? launcher gone?
                the next rank's beat too old, this one at one thing for too long (see heartbeat.py)?
    guard:      every 0.5 s: does the store answer the sentinel at all?

A rank that dies is reported although all have been asked to stop (see signals.py), and nobody then leaves in order.
"""

from __future__ import annotations

import os
import signal
import threading

from pipeline.ranks.election import is_over
from pipeline.ranks.exit import GRACE_S, Exit
from pipeline.ranks.heartbeat import Heartbeat
from pipeline.ranks.keys import Key
from pipeline.ranks.peers import WATCH_S, Peers
from pipeline.ranks.process import REAP_S
from pipeline.ranks.signals import END, Signals
from pipeline.ranks.words import doing, line_for_the_dead, stopped_by_ctrl_c, where


class Sentinel:
    """Watches from its creation to ``close``, both in the main thread."""

    def __init__(self, peers: Peers, heart: Heartbeat, signals: Signals, exit: Exit) -> None:
        self._peers = peers
        self._heart = heart
        self._signals = signals
        self._exit = exit
        self._closed = threading.Event()
        signals.handle_by_pipe()
        self._threads = [
            threading.Thread(target=self._watch, name="sentinel", daemon=True),
            threading.Thread(target=self._watch_store, name="guard", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End both threads."""
        sentinel, guard = self._threads
        self._signals.end_wait()
        sentinel.join()
        self._closed.set()
        guard.join()

    def _watch(self) -> None:
        peers, heart = self._peers, self._heart
        while True:
            heart.idle()
            number = self._signals.wait(min(WATCH_S, heart.period_s / 2))
            if number == END:
                return
            self._exchange()
            if is_over(peers):
                self._exit.lock.acquire()
                self._exit.follow(1)
            lost = peers.dead()
            silent = heart.next_is_silent()
            if silent is not None and peers.left(silent):
                silent = None
            late = heart.overdue()
            if not (number or lost or silent is not None or late or peers.orphaned() or peers.store_gone):
                continue
            # Before the election: losers end at once, and are dead too.
            if lost or silent is None:
                line = line_for_the_dead(peers, heart, doing(peers.rank, heart.place()))
            else:
                line = heart.line_for_the_silent()
            if not lost and silent is None and late:
                line = late
            self._exit.lock.acquire()
            if number == signal.SIGINT:
                self._exit.leave(130, stopped_by_ctrl_c(heart.place()))
            if number == signal.SIGTERM and not lost:
                self._exit.leave(143, f"rank {peers.rank}: stopped by SIGTERM{where(heart.place())}")
            self._exit.leave(1, line)

    def _exchange(self) -> None:
        """Beats, and what signals ask for: from any rank to rank 0."""
        peers, signals = self._peers, self._signals
        if peers.store_gone or peers.store is None:
            return
        try:
            self._heart.tick(peers.store)
            if peers.rank > 0 and signals.stop is not None:
                peers.set(Key.STOP(), signals.stop)
            if peers.rank == 0 and signals.stop is None and peers.has(Key.STOP()):
                signals.stop = peers.get(Key.STOP())
        except RuntimeError:
            peers.store_gone = True

    def _watch_store(self) -> None:
        """Where the store's host is stopped, a question never returns: sentinel and main thread may sit in one."""
        peers, heart = self._peers, self._heart
        looks = 0
        while not self._closed.wait(WATCH_S):
            seconds = heart.unanswered_s()
            looks = looks + 1 if seconds else 0
            if looks == 2:  # after one, this process may just have been suspended in the middle of a question
                peers.store_gone = True
                if not self._exit.lock.acquire(timeout=GRACE_S + REAP_S):  # held by a thread that sits in one
                    os._exit(1)
                host = "the launcher" if peers.store_host is None else "its host"
                why = f"the store has not answered for {seconds:.1f} s ({host} stopped? machine gone?)"
                line = line_for_the_dead(peers, heart, f"{doing(peers.rank, heart.place())}; {why}")
                self._exit.leave(1, line)
