"""One rank fails: every process ends within seconds, and ONE line says which rank, which module and why.

    main thread:      exception -> report() --+
                                              +--> lock -> election -> winner prints -> os._exit
    sentinel thread:  a signal, a dead or     |            losers stay silent
                      silent peer ... --------+
    guard thread:     the store is silent ----+

    signals.py  sentinel.py  peers.py         what can happen
    election.py  exit.py  words.py            who says what, and how all end
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from pipeline.base.errors import MARK, ConfigError, InUseError, LocalpipeError, NonFiniteError, PeerLost
from pipeline.ranks.election import is_over
from pipeline.ranks.exit import GRACE_S, Exit
from pipeline.ranks.heartbeat import Heartbeat
from pipeline.ranks.keys import Key
from pipeline.ranks.peers import Peers
from pipeline.ranks.sentinel import Sentinel
from pipeline.ranks.signals import Signals
from pipeline.ranks.team import Team
from pipeline.ranks.words import line_for_the_dead, own_story, stopped_by_ctrl_c


class FailureReporter:
    """Where every failure of this rank goes. Create it in the main thread, before anything can fail; ``join`` the team
    as soon as there is one.

    Args:
        rank, size: which of how many this one is.
        deadline_s: a rank of which nothing is heard for so long has failed.
        setup_deadline_s: so does one that has been at one thing for so long before its first step.
        run_dir: where ``failure-rank<r>.txt`` (the traceback) goes; None: the line names file and line.

    Attributes:
        heart: what this rank tells of itself, and what it knows of the others.
        run_dir: see above; may become known later.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        deadline_s: float = 60.0,
        setup_deadline_s: float = 0.0,
        run_dir: Path | None = None,
    ) -> None:
        self.heart = Heartbeat(rank, size, deadline_s, setup_deadline_s)
        self.run_dir = run_dir
        self._alone = size == 1
        self._peers = Peers(rank, size)
        self._signals = Signals(rank, self._alone)
        self._exit = Exit(self._peers)
        self._sentinel: Sentinel | None = None
        self._raised = False

    def join(self, team: Team, store_host: int | None) -> None:
        """Watch the other ranks from now on; in a team of one there is nobody to watch.

        Args:
            store_host: the rank whose process serves the store, None if the launcher does. It leaves last.
        """
        if not self._alone:
            self.heart.start()
            self._peers.join(team.store.clone(), store_host)
            self._sentinel = Sentinel(self._peers, self.heart, self._signals, self._exit)

    def describe(self, modules: str) -> None:
        """Set what this rank runs, e.g. ``"modules 1-2 (layer2.0 .. layer3.1)"`` (known once the network is cut)."""
        self.heart.describe(modules)
        self._peers.describe(modules)

    def progress(self, epoch: int, step: int, activity: str) -> None:
        """Note where this rank is, e.g. ``(0, 7, "F2.0")``. Costs one assignment and a look at the clock."""
        self.heart.progress(epoch, step, activity)

    def before_exit(self, action: Callable[[], None]) -> None:
        """Call ``action`` before a failure ends this process, which runs nothing else then."""
        self._exit.before = action

    def stop_gracefully(self) -> None:
        """From now on SIGTERM and SIGINT only ask for a stop (see ``stop_request``), except that a second SIGINT ends
        this rank at once. With one process this needs the main thread; in another one signals stay as they are."""
        self._signals.stop_gracefully()

    def stop_request(self) -> str | None:
        """Which signal asks for a stop, e.g. ``"SIGTERM on rank 2"``, or None. Rank 0 knows of a signal to any rank
        within ``peers.WATCH_S``, another rank of its own only. Costs nothing."""
        return self._signals.stop

    def report(self, error: BaseException, module: str | None = None) -> NoReturn:
        """End this run because of ``error``.

        With several processes at most one rank of the job prints a line, and this process ends by ``os._exit``: threads
        that wait in C++ would abort an orderly exit. Exit code 130 for KeyboardInterrupt, the code of a SystemExit,
        else 1. With one process ``error`` is raised again, with the same line as a note.

        Args:
            module: the module at fault, e.g. ``"module 2 (layer3.0-layer3.4)"``.
        """
        if self._alone:
            self._raise(error, module)
        self._signals.ignore_workers()
        self._exit.lock.acquire()
        if self.heart.unanswered_s():
            self._peers.store_gone = True  # its host is stopped: a question would never return
        if isinstance(error, KeyboardInterrupt):
            self._exit.leave(130, stopped_by_ctrl_c(self.heart.place()))
        if isinstance(error, PeerLost | dist.DistError) or "onnection closed by peer" in str(error):
            self._await_peers_own_report()
            if isinstance(error, PeerLost):
                witness, peer = str(error), error.peer
            else:
                witness, peer = self._own_story(error, module), -1
            self._exit.leave(1, line_for_the_dead(self._peers, self.heart, witness, peer))
        if isinstance(error, NonFiniteError):
            self._await_where_it_began(error)
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        refused = isinstance(error, ConfigError) and not isinstance(error, InUseError)
        self._exit.leave(code, lambda: self._own_story(error, module), refused)

    def close(self) -> None:
        """Orderly end: from now on this rank's process may go. Restores the signal handlers."""
        if self._sentinel is not None:
            self._sentinel.close()
        self._peers.leave()  # after the sentinel has ended: the store may go from here on
        self._signals.restore()

    def _raise(self, error: BaseException, module: str | None) -> NoReturn:
        if not self._raised:  # else it is on its way out
            self._raised = True
            told = isinstance(error, KeyboardInterrupt)
            story = stopped_by_ctrl_c(self.heart.place()) if told else self._own_story(error, module)
            if story != str(error):
                error.add_note(MARK + " ".join(story.split()))
            if isinstance(error, LocalpipeError):
                error.reported = True
            self._exit.tidy_up()
            self._signals.restore()
        raise error

    def _await_peers_own_report(self) -> None:
        """A closed connection does not tell the cause: wait until a report or a dead process explains it."""
        peers, end = self._peers, time.monotonic() + GRACE_S
        while peers.store is not None and time.monotonic() < end:
            if is_over(peers) or peers.store_gone or peers.dead():
                return
            time.sleep(0.05)

    def _await_where_it_began(self, error: NonFiniteError) -> None:
        """NaN spreads faster than it is noticed: let the rank speak where it appeared first."""
        peers = self._peers
        if peers.store is None or peers.store_gone:
            return
        peers.set(Key.NONFINITE(rank=peers.rank), json.dumps(error.precedence))
        self._await_peers_own_report()
        keys = {rank: Key.NONFINITE(rank=rank) for rank in range(peers.size)}
        told = {rank: json.loads(peers.get(key)) for rank, key in keys.items() if peers.has(key)}
        if told and min(told, key=told.__getitem__) != peers.rank:
            self._await_peers_own_report()

    def _own_story(self, error: BaseException, module: str | None) -> str:
        return own_story(error, self._peers.rank, module, self.heart.place(), self.run_dir)
