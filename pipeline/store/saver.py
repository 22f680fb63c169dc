"""Saving while training goes on: every rank copies its modules between two steps, a thread of its own writes the copy.

    rank 0   step s | copy | step s+1 ...                       main threads go on
    rank 1       step s | copy | step s+1 ...
                           |
    threads      write modules, hash, tell the store:  saving/<s>/<rank>  modules begun,  saved/<s>/<rank>
    rank 0's     waits for all, writes the manifest, renames, removes old ones

In the step loop a rank waits at most for its own last save (rank 0: for all of it), where it saves faster than it can
write. All ranks copy after the same step, so the copies belong together. A save that fails on one rank fails as a
whole, says so, and leaves the older checkpoints as they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

from torch import Tensor

from pipeline.base.config import CheckpointConfig
from pipeline.base.errors import DeadlineExceeded, LocalpipeError
from pipeline.ranks.keys import Key
from pipeline.ranks.patience import Awaited
from pipeline.ranks.team import Team, ranks
from pipeline.store import checkpoint
from pipeline.store.checkpoint import Files

POLL_S = 0.05
LOOK_S = 0.5


class SaveFailed(LocalpipeError):
    """A checkpoint could not be written; the message says which rank and why."""


@dataclass(frozen=True)
class Document:
    """What only rank 0 knows of a checkpoint. ``contents`` gives the manifest and the records of the finished epochs;
    it is called once all ranks have saved."""

    config_toml: str
    contents: Callable[[], tuple[dict[str, Any], list[dict[str, Any]]]]


class Saver:
    """Writes the checkpoints of one rank; on rank 0 it also makes them visible.

    Args:
        team: its deadline is the longest time that writing one module takes, and the longest wait for a rank to come to
            a save, unless it is just slow.
        checkpoints: the directory of all checkpoints of the run, on a file system that all ranks share.
        settings: how many stay.
        writers: the ranks that save, rank 0 among them; None: all.
        replica: of this rank; of all but the first only parts are saved (see :mod:`pipeline.local.late_parts`).
    """

    def __init__(
        self,
        team: Team,
        checkpoints: Path,
        settings: CheckpointConfig,
        writers: Sequence[int] | None = None,
        replica: int = 0,
    ) -> None:
        self._team = team
        self._checkpoints = checkpoints
        self._settings = settings
        self._writers = range(team.size) if writers is None else writers
        self._replica = replica
        self._thread: threading.Thread | None = None
        self._notes: list[str] = []
        self._error: Exception | None = None
        self._moved = 0  # counts what the thread has finished
        self._awaited: int | None = None  # a rank that has not come to this save yet
        self._step = 0

    def save(
        self,
        step: int,
        states: dict[int, dict[str, Tensor]],
        document: Document | None,
        arrival: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to write ``states`` (by module; copies that nobody changes) as the checkpoint of ``step``.

        ``document`` is given on rank 0. The thread reads ``states`` once ``arrival`` has returned. Waits until this
        rank's last save is done; meanwhile there are two copies.

        Raises:
            DeadlineExceeded: that save does not get on.
        """
        self.join()
        self._error = None
        self._step, self._awaited = step, None
        work = (step, states, document, arrival)
        self._thread = threading.Thread(target=self._write, args=work, name="saver", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until this rank's part (on rank 0: the whole checkpoint) is written or has failed."""
        while self._thread is not None and self._thread.is_alive():
            self._await_news(self._thread)
        self._thread = None

    def _await_news(self, thread: threading.Thread) -> None:
        """Wait until the thread gets on, or ends. Where it waits for a rank, it knows itself for how long."""
        moved, rank = self._moved, self._awaited
        awaited = None if rank is None else (rank, f"for rank {rank} to come to the checkpoint of step {self._step}")

        def look(seconds: float) -> None:
            thread.join(min(seconds, LOOK_S))
            if thread.is_alive() and (self._moved, self._awaited) == (moved, rank):
                raise Empty

        def late(waited_s: float, _: str) -> DeadlineExceeded:
            return DeadlineExceeded(
                f"rank {self._team.rank} has waited {waited_s:g} s for a part of the checkpoint of step {self._step}; "
                "is the disk that slow? save less often (checkpoint.every_*) or raise runtime.deadline_s"
            )

        self._team.wait(look, lambda: awaited, late, self._team.deadline_s if rank is None else math.inf)

    def error(self) -> str | None:
        """Rank 0, after :meth:`join`: why the last save failed; None if it did not."""
        return None if self._error is None else str(self._error)

    def take_notes(self) -> list[str]:
        """Rank 0: warnings since the last call."""
        taken = []
        while self._notes:  # the thread may add to it meanwhile
            taken.append(self._notes.pop(0))
        return taken

    def _write(
        self, step: int, states: dict[int, dict[str, Tensor]], document: Document | None, arrival: Callable[[], None]
    ) -> None:
        """The thread."""
        outcome: dict[str, Any]
        try:
            arrival()
            files: Files = {}
            for index, state in states.items():
                self._count(step)
                folder = checkpoint.partial_folder(self._checkpoints, step)
                if self._replica:
                    files |= checkpoint.write_part(folder, index, self._replica, state)
                else:
                    files |= checkpoint.write_module(folder, index, state)
                self._moved += 1
            outcome = {"files": files}
        except BaseException as error:  # a panic of Rust, in which safetensors is written, is no Exception
            outcome = {"error": f"rank {self._team.rank}: {_cause(error)}"}
        if document is None:
            with contextlib.suppress(RuntimeError):  # the store is gone, and this job with it
                self._team.set(Key.SAVED(step=step, rank=self._team.rank), json.dumps(outcome))
            return
        try:
            self._publish(step, outcome, document)
        except Exception as error:
            self._error = error
            shutil.rmtree(checkpoint.partial_folder(self._checkpoints, step), ignore_errors=True)
            self._notes.append(
                f"the checkpoint of step {step} was not saved: {_cause(error)}; older ones are untouched"
            )

    def _count(self, step: int) -> None:
        """Tell rank 0 that a module is begun, so that the one before it is written."""
        if not self._team.leads:
            self._team.count(Key.SAVING(step=step, rank=self._team.rank))

    def _publish(self, step: int, outcome: dict[str, Any], document: Document) -> None:
        outcomes = [outcome, *self._collect(step)]
        errors = [part["error"] for part in outcomes if "error" in part]
        if errors:
            raise SaveFailed("; ".join(errors))
        files = {name: entry for part in outcomes for name, entry in part["files"].items()}
        manifest, history = document.contents()
        checkpoint.publish(self._checkpoints, step, files, manifest, document.config_toml, history)
        try:
            checkpoint.remove_old(self._checkpoints, step, self._settings.keep, self._settings.keep_best)
        except OSError as error:
            self._notes.append(f"an old checkpoint could not be removed: {_cause(error)}")

    def _collect(self, step: int) -> list[dict[str, Any]]:
        """The outcomes of the other ranks."""
        team = self._team
        begun, saved = team.each(Key.SAVING, step=step), team.each(Key.SAVED, step=step)
        missing = others = [rank for rank in self._writers if rank != team.rank]
        written: dict[int, str] = {}

        def look(seconds: float) -> tuple[list[int], dict[int, str]]:
            """Once they change: which ranks are missing, and how many modules those have begun that have begun."""
            end = time.monotonic() + min(seconds, LOOK_S)
            while time.monotonic() <= end:
                absent = [rank for rank in others if not team.has(saved[rank])]
                at_work = [rank for rank in absent if team.has(begun[rank])]
                counts = dict(zip(at_work, team.get(begun[rank] for rank in at_work), strict=True))
                self._awaited = next((rank for rank in absent if rank not in counts), None)
                if (absent, counts) != (missing, written):
                    return absent, counts
                time.sleep(POLL_S)
            raise Empty

        def awaited() -> Awaited:
            return None if self._awaited is None else (self._awaited, f"for rank {self._awaited} to save")

        def late(waited_s: float, verdict: str) -> SaveFailed:
            why = verdict or "no module of it is written"
            return SaveFailed(f"{ranks(missing)} did not save its part within {waited_s:g} s: {why}")

        while missing:
            missing, written = team.wait(look, awaited, late)
            self._moved += 1
        self._awaited = None
        texts = team.take(saved[rank] for rank in others)
        team.forget(begun[rank] for rank in others)
        return [json.loads(text) for text in texts]


def _cause(error: BaseException) -> str:
    if isinstance(error, LocalpipeError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
