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
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pipeline.base.config import CheckpointConfig
from pipeline.base.errors import DeadlineExceeded, LocalpipeError
from pipeline.ranks.patience import ASK_AGAIN, Patience
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
        store: shared by all ranks of this attempt, None for one process.
        checkpoints: the directory of all checkpoints of the run, on a file system that all ranks share.
        settings: how many stay.
        deadline_s: longest time that writing one module takes, and longest wait for a rank to come to a save, unless it
            is just slow.
        patience: knows that; told of the wait of ``join``.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        checkpoints: Path,
        settings: CheckpointConfig,
        deadline_s: float,
        patience: Patience,
    ) -> None:
        self._store = store.clone() if store is not None else None  # a connection of its own: threads must not queue up
        self._rank = rank
        self._ranks = range(world_size)
        self._checkpoints = checkpoints
        self._settings = settings
        self._deadline_s = deadline_s
        self._patience = patience
        self._thread: threading.Thread | None = None
        self._notes: list[str] = []
        self._error: Exception | None = None
        self._moved = 0  # counts what the thread has finished
        self._awaited: int | None = None  # a rank that has not come to this save yet
        self._step = 0

    def save(self, step: int, states: dict[int, dict[str, Tensor]], document: Document | None) -> None:
        """Begin to write ``states`` (by module; copies that nobody changes) as the checkpoint of ``step``.

        ``document`` is given on rank 0. Waits until this rank's last save is done; meanwhile there are two copies.

        Raises:
            DeadlineExceeded: that save does not get on.
        """
        self.join()
        self._error = None
        self._step, self._awaited = step, None
        self._thread = threading.Thread(target=self._write, args=(step, states, document), name="saver", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until this rank's part (on rank 0: the whole checkpoint) is written or has failed."""
        if self._thread is None:
            return
        seen, told, still_s = self._moved, None, 0.0
        while self._thread.is_alive():
            self._thread.join(LOOK_S)
            still_s += LOOK_S  # counted, not read from a clock: this job may have been suspended
            if self._moved != seen or self._awaited != told:
                seen, told, still_s = self._moved, self._awaited, 0.0
                self._patience.end()
                if told is not None:
                    self._patience.begin(told, f"for rank {told} to come to the checkpoint of step {self._step}")
            if self._thread.is_alive() and told is None and still_s > self._deadline_s:
                raise DeadlineExceeded(
                    f"rank {self._rank} has waited {self._deadline_s:g} s for a part of the checkpoint of step "
                    f"{self._step}; is the disk that slow? save less often (checkpoint.every_*) or raise "
                    "runtime.deadline_s"
                )
        self._patience.end()
        self._thread = None

    def error(self) -> str | None:
        """Rank 0, after :meth:`join`: why the last save failed; None if it did not."""
        return None if self._error is None else str(self._error)

    def take_notes(self) -> list[str]:
        """Rank 0: warnings since the last call."""
        taken = []
        while self._notes:  # the thread may add to it meanwhile
            taken.append(self._notes.pop(0))
        return taken

    def _write(self, step: int, states: dict[int, dict[str, Tensor]], document: Document | None) -> None:
        """The thread."""
        outcome: dict[str, Any]
        try:
            files: Files = {}
            for index, state in states.items():
                self._count(step)
                files |= checkpoint.write_module(checkpoint.partial_folder(self._checkpoints, step), index, state)
                self._moved += 1
            outcome = {"files": files}
        except BaseException as error:  # torch's CheckpointException is no Exception
            outcome = {"error": f"rank {self._rank}: {_cause(error)}"}
        if document is None:
            assert self._store is not None
            with contextlib.suppress(RuntimeError):  # the store is gone, and this job with it
                self._store.set(_key(step, self._rank), json.dumps(outcome))
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
        if self._rank > 0:
            self._store.add(_count_key(step, self._rank), 1)

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
        others = [rank for rank in self._ranks if rank != self._rank]
        if not others:
            return []
        assert self._store is not None
        written: dict[int, bytes] = {}
        waited_s, limit_s = 0.0, self._deadline_s
        while missing := [rank for rank in others if not self._store.check([_key(step, rank)])]:
            began = [rank for rank in missing if self._store.check([_count_key(step, rank)])]
            now = dict(zip(began, self._store.multi_get([_count_key(step, rank) for rank in began]), strict=True))
            self._awaited = next((rank for rank in missing if rank not in began), None)
            if now != written:
                written, waited_s, limit_s = now, 0.0, self._deadline_s
                self._moved += 1
            if waited_s > limit_s:
                late = self._awaited
                verdict = "no module of it is written" if late is None else self._patience.verdict(late)
                if verdict is not None:
                    who = ", ".join(map(str, missing))
                    raise SaveFailed(f"rank {who} did not save its part within {waited_s:g} s: {verdict}")
                limit_s += self._deadline_s / ASK_AGAIN
            time.sleep(POLL_S)
            waited_s += POLL_S
        self._awaited = None
        keys = [_key(step, rank) for rank in others]
        texts = [json.loads(text) for text in self._store.multi_get(keys)]
        for key in [*keys, *(_count_key(step, rank) for rank in others)]:
            self._store.delete_key(key)
        return texts


def _key(step: int, rank: int) -> str:
    return f"saved/{step}/{rank}"


def _count_key(step: int, rank: int) -> str:
    return f"saving/{step}/{rank}"


def _cause(error: BaseException) -> str:
    if isinstance(error, LocalpipeError):
        return str(error)
    root = error
    if isinstance(error, CheckpointException):
        root, _ = next(iter(error.failures.values()))
    return " ".join(f"{type(root).__name__}: {root}".split())[:300]
