"""One rank fails: every process ends within seconds, and ONE line says which rank, which module and why.

    main thread:      exception -> report() --+
                                              +--> lock -> elect (store.compare_set) -> winner prints ->
                                              os._exit
    sentinel thread:  SIGTERM, SIGINT  -------+            losers stay silent
                      every 0.5 s: failure key in the store? a peer's process gone? launcher gone?
                                   the next rank's beat too old, this one at one thing for too long (see heartbeat)?
    guard thread:     every 0.5 s: does the store answer the sentinel at all?

Why a sentinel thread: the launcher sends SIGTERM to the others about 0.1 s after the first process ends, and
a Python signal handler cannot run while the main thread sits in C++ (a collective, a group being built). The
C half of Python's handler runs at once in any thread and writes the signal number to a pipe
(``signal.set_wakeup_fd``); the sentinel reads that pipe. Blocking SIGTERM with a signal mask would do as
well, but child processes inherit a mask (data loader workers could not be terminated), and threads started
before would still die silently.

Why an election: the neighbours of a dead rank fail too (connection closed) and must not each print their own
story. Invariant: a process that leaves because of a failure has stood for election first, so a process that
is gone without a failure key in the store has died without a message (SIGKILL, out of memory).

A run can ask that a signal does not end it at once (``stop_gracefully``): the first one is then only noted. Any rank
can get it, rank 0 is asked:

    rank 2, sentinel:  SIGTERM -> store: stop = "SIGTERM on rank 2"        rank 0, sentinel: stop? -> stop_request()

All the rest stays as it is: a rank that dies after the signal is reported, and nobody leaves in order.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from pipeline.base.errors import MARK, ConfigError, InUseError, LocalpipeError, NonFiniteError, PeerLost
from pipeline.ranks import launcher
from pipeline.ranks.forks import SIGNALS, SignalOwner, follow_forks
from pipeline.ranks.heartbeat import Heartbeat
from pipeline.ranks.keys import Key
from pipeline.ranks.process import REAP_S, Process, reap
from pipeline.ranks.start_up import take_noted
from pipeline.ranks.words import doing, own_story, where

WATCH_S = 0.5
"""Seconds between two looks of the sentinel at the store and at the peers' processes."""
GRACE_S = 2.0
"""Seconds that a rank which lost a peer waits for the peer's own report."""


class FailureDesk(SignalOwner):
    """Where every failure of this rank goes. Create it in the main thread, before anything can fail.

    Args:
        store: shared by all ranks of this attempt, or None (one process). The desk clones its connection.
        run_dir: where ``failure-rank<r>.txt`` (the traceback) goes; None: the line names file and line.
        store_host: the rank whose process serves the store, None if the launcher does. It leaves last.
        deadline_s: a rank of which nothing is heard for so long has failed.
        setup_deadline_s: so does one that has been at one thing for so long before its first step.

    Attributes:
        heart: what this rank tells of itself, and what it knows of the others.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        run_dir: Path | None = None,
        store_host: int | None = None,
        deadline_s: float = 60.0,
        setup_deadline_s: float = 0.0,
    ) -> None:
        self.rank = rank
        self.heart = Heartbeat(rank, world_size, deadline_s, setup_deadline_s)
        self.run_dir = run_dir
        self.before_exit: Callable[[], None] | None = None  # e.g. restores the terminal; os._exit runs nothing else
        self._world_size = world_size
        self._store_host = store_host
        self._store = None if store is None else store.clone()
        self._me = Process.current("starting")
        self._peers: dict[int, Process] = {}
        self._launcher = os.getppid()
        self._store_gone = False
        self.graceful = False
        self._interrupts = 0
        self._noted_in_start_up: list[int] = []
        self._stop: str | None = None
        # Held from the election to os._exit: nobody ends a winner before it has printed.
        self._lock = threading.Lock()
        self._restore: list[Callable[[], object]] = []
        self._thread: threading.Thread | None = None
        self._guard: threading.Thread | None = None
        self._closed = threading.Event()
        if store is not None and world_size > 1:
            self.describe("starting")
            self._start_sentinel(store.clone())

    def describe(self, modules: str) -> None:
        """Set what this rank runs, e.g. ``"modules 1-2 (layer2.0 .. layer3.1)"`` (known once the partition is made)."""
        self._me = Process.current(modules)
        self.heart.describe(modules)
        if self._store is not None:
            self._store.set(Key.PROCESS(rank=self.rank), json.dumps(asdict(self._me)))

    def progress(self, epoch: int, step: int, activity: str) -> None:
        """Note where this rank is, e.g. ``(0, 7, "F2.0")``. Costs one assignment and a look at the clock."""
        self.heart.progress(epoch, step, activity)

    def stop_gracefully(self) -> None:
        """From now on SIGTERM and SIGINT only ask for a stop (see ``stop_request``), except that a second SIGINT ends
        this rank at once. With one process this needs the main thread; in another one signals stay as they are."""
        self.graceful = True
        if self._world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handle_signals()
        for number in self._noted_in_start_up:
            self._noted(number)

    def stop_request(self) -> str | None:
        """Which signal asks for a stop, e.g. ``"SIGTERM on rank 2"``, or None. Rank 0 knows of a signal to any rank
        within WATCH_S, another rank of its own only. Costs nothing."""
        return self._stop

    def report(self, error: BaseException, module: str | None = None) -> NoReturn:
        """End this run because of ``error``.

        With several processes at most one rank of the job prints a line, and this process ends by ``os._exit``: threads
        that wait in C++ would abort an orderly exit. Exit code 130 for KeyboardInterrupt, the code of a SystemExit,
        else 1. With one process ``error`` is raised again, with the same line as a note.

        Args:
            module: the module at fault, e.g. ``"module 2 (layer3.0-layer3.4)"``.
        """
        if self._world_size == 1:
            self._raise(error, module)
        self._ignore_workers()
        self._lock.acquire()
        if self.heart.unanswered_s():
            self._store_gone = True  # its host is stopped: a question would never return
        if isinstance(error, KeyboardInterrupt):
            self._leave(130, lambda: f"stopped by ctrl-C{where(self.heart.place())}")
        if isinstance(error, PeerLost | dist.DistError) or "onnection closed by peer" in str(error):
            self._await_peers_own_report()
            witness = str(error) if isinstance(error, PeerLost) else self._own_story(error, module)
            obituary = self._obituary(witness, error.peer if isinstance(error, PeerLost) else -1)
            self._leave(1, obituary)
        if isinstance(error, NonFiniteError):
            self._await_where_it_began(error)
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        refused = isinstance(error, ConfigError) and not isinstance(error, InUseError)
        self._leave(code, lambda: self._own_story(error, module), refused)

    def _raise(self, error: BaseException, module: str | None) -> NoReturn:
        if not self._closed.is_set():  # else it is on its way out
            self._closed.set()
            told = isinstance(error, KeyboardInterrupt)
            story = f"stopped by ctrl-C{where(self.heart.place())}" if told else self._own_story(error, module)
            if story != str(error):
                error.add_note(MARK + " ".join(story.split()))
            if isinstance(error, LocalpipeError):
                error.reported = True
            self._end_orderly()
        raise error

    def close(self) -> None:
        """Orderly end: from now on this rank's process may go. Restores the signal handlers."""
        if self._thread is not None and self._guard is not None:
            os.write(self._wake, b"\0")
            self._thread.join()
            self._closed.set()
            self._guard.join()
            self._thread = self._guard = None
        if self._store is not None:  # after the sentinel has ended: the store may go from here on
            self._store.set(Key.LEFT(rank=self.rank), "1")
        self._restore_signals()

    # -- the sentinel thread ---------------------------------------------------------------------------------

    def _start_sentinel(self, store: dist.Store) -> None:
        bell, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        previous_fd = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._restore.append(lambda: signal.set_wakeup_fd(previous_fd))
        self._handle_signals()
        self._restore.append(lambda: os.close(self._wake))
        self._thread = threading.Thread(target=self._watch, args=(bell, store), name="sentinel", daemon=True)
        self._thread.start()
        self._guard = threading.Thread(target=self._watch_store, name="guard", daemon=True)
        self._guard.start()

    def _handle_signals(self) -> None:
        self._noted_in_start_up += take_noted()
        for number in SIGNALS:
            previous = signal.signal(number, self._on_signal)
            self._restore.append(partial(signal.signal, number, previous))
        follow_forks()

    def _restore_signals(self) -> None:
        for restore in self._restore:
            restore()
        self._restore.clear()

    def _on_signal(self, number: int, frame: object) -> None:
        """Python half of the signal handlers. With several processes the sentinel acts on the byte in the pipe."""
        if self._world_size == 1 and not self._noted(number):
            raise KeyboardInterrupt

    def _noted(self, number: int) -> bool:
        """Take a signal for a request to stop; False: it means now."""
        again = self._interrupts > 0  # also SIGTERM: torchrun passes on a second ctrl-C as that
        self._interrupts += number == signal.SIGINT
        if not self.graceful or again:
            return False
        self._stop = self._stop or f"{signal.Signals(number).name} on rank {self.rank}"
        return True

    def _watch(self, bell: int, store: dist.Store) -> None:
        while True:
            self.heart.idle()
            rang = select.select([bell], [], [], min(WATCH_S, self.heart.period_s / 2))[0]
            rung = os.read(bell, 4096) if rang else b""
            # Python writes every signal that it has a handler for; SIGCHLD, SIGUSR1 are the business of their handlers.
            number = next((byte for byte in rung if byte in SIGNALS and not self._noted(byte)), None)
            if number is None and 0 in rung:
                os.close(bell)
                return
            self._exchange(store)
            if self._has(store, Key.FAILURE()):
                self._lock.acquire()  # not while this very process is the one that prints
                self._exit(self._code_of_loser(1))
            lost = self._dead_peers(store)
            silent = self.heart.next_is_silent()
            if silent is not None and self._has(store, Key.LEFT(rank=silent)):
                silent = None
            late = self.heart.overdue()
            if not (number or lost or silent is not None or late or self._orphaned() or self._store_gone):
                continue
            # Before the election: losers end at once, and are dead too.
            witness = doing(self.rank, self.heart.place())
            obituary = self._obituary(witness) if lost or silent is None else self.heart.obituary()
            self._lock.acquire()
            if number == signal.SIGINT:
                self._leave(130, lambda: f"stopped by ctrl-C{where(self.heart.place())}")
            if number == signal.SIGTERM and not lost:
                self._leave(143, lambda: f"rank {self.rank}: stopped by SIGTERM{where(self.heart.place())}")
            self._leave(1, obituary if lost or silent is not None else late or obituary)

    def _watch_store(self) -> None:
        """Where the store's host is stopped, a question never returns: sentinel and main thread may sit in one."""
        looks = 0
        while not self._closed.wait(WATCH_S):
            seconds = self.heart.unanswered_s()
            looks = looks + 1 if seconds else 0
            if looks == 2:  # after one, this process may just have been suspended in the middle of a question
                self._store_gone = True
                if not self._lock.acquire(timeout=GRACE_S + REAP_S):  # held by a thread that sits in one
                    os._exit(1)
                host = "the launcher" if self._store_host is None else "its host"
                why = f"the store has not answered for {seconds:.1f} s ({host} stopped? machine gone?)"
                obituary = self._obituary(f"{doing(self.rank, self.heart.place())}; {why}")
                self._leave(1, obituary)

    def _exchange(self, store: dist.Store) -> None:
        """Beats, and what signals ask for: from any rank to rank 0."""
        if self._store_gone:
            return
        try:
            self.heart.tick(store)
            if self.rank > 0 and self._stop is not None:
                store.set(Key.STOP(), self._stop)
            if self.rank == 0 and self._stop is None and store.check([Key.STOP()]):
                self._stop = store.get(Key.STOP()).decode()
        except RuntimeError:
            self._store_gone = True

    def _orphaned(self) -> bool:
        return os.getppid() != self._launcher

    def _dead_peers(self, store: dist.Store) -> list[int]:
        """Ranks of this host whose process is gone although they neither failed aloud nor left in order."""
        dead = []
        for rank in range(self._world_size):
            if rank == self.rank:
                continue
            if rank not in self._peers and self._has(store, Key.PROCESS(rank=rank)):
                self._peers[rank] = self._read(store, rank)
            peer = self._peers.get(rank)
            ended = peer is not None and peer.host == self._me.host and peer.gone()
            if ended and not self._has(store, Key.LEFT(rank=rank)):
                dead.append(rank)
        return dead

    def _read(self, store: dist.Store, rank: int) -> Process:
        return Process(**json.loads(store.get(Key.PROCESS(rank=rank))))

    # -- the way out -----------------------------------------------------------------------------------------

    def _await_peers_own_report(self) -> None:
        """A closed connection does not tell the cause: wait until a report or a dead process explains it."""
        end = time.monotonic() + GRACE_S
        while self._store is not None and time.monotonic() < end:
            if self._has(self._store, Key.FAILURE()) or self._store_gone or self._dead_peers(self._store):
                return
            time.sleep(0.05)

    def _await_where_it_began(self, error: NonFiniteError) -> None:
        """NaN spreads faster than it is noticed: let the rank speak where it appeared first."""
        if self._store is None or self._store_gone:
            return
        self._store.set(Key.NONFINITE(rank=self.rank), json.dumps(error.precedence))
        self._await_peers_own_report()
        keys = {rank: Key.NONFINITE(rank=rank) for rank in range(self._world_size)}
        told = {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._has(self._store, key)}
        if told and min(told, key=told.__getitem__) != self.rank:
            self._await_peers_own_report()

    def _leave(self, code: int, story: str | Callable[[], str], refused: bool = False) -> NoReturn:
        if self._elected(refused):
            line = MARK + " ".join((story if isinstance(story, str) else story()).split())[:1000]
            os.write(2, f"{line}\n".encode())  # one write: lines of ranks do not mix
            launcher.tell(line, refused)
            self._reap()
            self._exit(code)
        self._exit(self._code_of_loser(code))

    def _elected(self, refused: bool) -> bool:
        if self._store is None:
            return launcher.elected()
        ballot = json.dumps({"rank": self.rank, "host": self._me.host, "launcher": self._launcher, "refused": refused})
        if not self._has(self._store, Key.FAILURE()) and not self._store_gone:
            with contextlib.suppress(RuntimeError):
                return self._store.compare_set(Key.FAILURE(), "", ballot) == ballot.encode()
            self._store_gone = True
        # No vote is possible without a store. Its host lingers after a report (see _exit), so we would have
        # seen the failure key: the host died without a message. The lowest other rank of every machine tells.
        elsewhere = [rank for rank, peer in self._peers.items() if peer.host != self._me.host]
        here = [rank for rank in range(self._world_size) if rank not in (self._store_host, *elsewhere)]
        return self._store_gone and self.rank == min(here)

    def _code_of_loser(self, code: int) -> int:
        """0 where the launcher of this rank sees the one that has told why fail: it would list this one in seven more
        lines. Else the launcher learns from this one, too, that a refusal is final."""
        if self._store is None or not launcher.watches() or not self._has(self._store, Key.FAILURE()):
            return code
        verdict = json.loads(self._store.get(Key.FAILURE()))
        if (verdict["host"], verdict["launcher"]) == (self._me.host, self._launcher):
            return 0
        if verdict["refused"]:
            launcher.tell(f"{MARK}rank {self.rank} has ended with the others", refused=True)
        return code

    def _reap(self) -> None:
        """A peer that is stopped, or hangs in C code with the interpreter lock held, cannot end itself."""
        known = launcher.siblings()  # also those that have not come to the store
        if self._store is not None:
            self._dead_peers(self._store)  # reads the processes not known yet
            known |= self._peers
        mine = [peer for peer in known.values() if peer.host == self._me.host]
        reap(mine)

    def _ignore_workers(self) -> None:
        """A worker of a loader that ends from now on raises nothing here: torch's handler would cut a report short."""
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._restore.append(lambda: signal.signal(signal.SIGCHLD, previous))

    def _end_orderly(self) -> None:
        """What an exit would leave undone: a terminal to restore, text in buffers, handlers."""
        if self.before_exit is not None:
            with contextlib.suppress(Exception):
                self.before_exit()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if self._world_size == 1:
            self._restore_signals()

    def _exit(self, code: int) -> NoReturn:
        self._end_orderly()
        with contextlib.suppress(Exception):  # of a process that has forked itself, they may be its parent's
            for worker in multiprocessing.active_children():
                if worker.is_alive():
                    worker.kill()  # a loader's workers would outlive this process by seconds
        if self._store_host == self.rank:
            time.sleep(3 * WATCH_S)  # the others read the failure key from us
        os._exit(code)

    # -- the words -------------------------------------------------------------------------------------------

    def _own_story(self, error: BaseException, module: str | None) -> str:
        return own_story(error, self.rank, module, self.heart.place(), self.run_dir)

    def _obituary(self, witness: str, peer: int = -1) -> str:
        """The line for ranks that left no message; ``witness``: what this rank saw; ``peer``: whom it lost, if it knows
        (on another machine it may not see more)."""
        if self._store is None:
            return witness
        dead = self._dead_peers(self._store)
        if self._store_gone:  # then nobody can be told from one who left in order
            dead = [] if self._store_host is None else [self._store_host]
        if not dead:
            what = "the launcher has ended; " if self._orphaned() else ""
            if peer >= 0 and not what:
                what = f"rank {peer} ({self._modules(peer)}) is gone, its machine or its network; "
            return what + witness
        named = ", ".join(f"rank {rank} ({self._modules(rank)})" for rank in dead)
        if self.heart.unanswered_s():
            return f"{named} does not answer (stopped? machine gone?); {witness}"
        return f"{named} died without a message (killed? out of memory?); {witness}"

    def _has(self, store: dist.Store, key: str) -> bool:
        """Is ``key`` in the store? One that failed is not asked again: each try prints a C++ traceback."""
        if not self._store_gone:
            try:
                return store.check([key])
            except RuntimeError:
                self._store_gone = True
        return False

    def _modules(self, rank: int) -> str:
        if self._store is not None and self._has(self._store, Key.PROCESS(rank=rank)):  # read again: described since
            self._peers[rank] = self._read(self._store, rank)
        return self._peers[rank].modules if rank in self._peers else "unknown modules"
