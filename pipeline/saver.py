"""Saving while training goes on: every rank copies its modules between two steps, a thread of its own writes the copy.

    rank 0   step s | copy | step s+1 ...                       main threads go on
    rank 1       step s | copy | step s+1 ...
                           |
    threads      write modules, hash, tell the store:  saved/<s>/<rank>
    rank 0's     waits for all, writes the manifest, renames, removes old ones

In the step loop a rank waits at most for its own last save, where it saves faster than it can write. All ranks copy
after the same step, so the copies belong together. A save that fails on one rank fails as a whole, says so, and leaves
the older checkpoints as they are.
"""

from __future__ import annotations

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

from pipeline import checkpoint
from pipeline.checkpoint import Files
from pipeline.config import CheckpointConfig
from pipeline.errors import DeadlineExceeded, LocalpipeError

POLL_S = 0.02
GRACE_S = 5.0
"""By which the thread itself gives up earlier than the rank that waits for it: it can say what for."""


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
        deadline_s: longest wait in which no file of a save is finished.
        moves: called in a wait when another one is.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        checkpoints: Path,
        settings: CheckpointConfig,
        deadline_s: float,
        moves: Callable[[], None],
    ) -> None:
        self._store = store.clone() if store is not None else None  # a connection of its own: threads must not queue up
        self._rank = rank
        self._ranks = range(world_size)
        self._checkpoints = checkpoints
        self._settings = settings
        self._deadline_s = deadline_s
        self._moves = moves
        self._thread: threading.Thread | None = None
        self._notes: list[str] = []
        self._error: Exception | None = None
        self._moved = time.monotonic()  # when the thread has last finished something
        self._step = 0

    def save(self, step: int, states: dict[int, dict[str, Tensor]], document: Document | None) -> None:
        """Begin to write ``states`` (by module; copies that nobody changes) as the checkpoint of ``step``.

        ``document`` is given on rank 0. Waits until this rank's last save is done; meanwhile there are two copies.

        Raises:
            DeadlineExceeded: that save does not get on.
        """
        self.join()
        self._error = None
        self._step, self._moved = step, time.monotonic()
        self._thread = threading.Thread(target=self._write, args=(step, states, document), name="saver", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until this rank's part (on rank 0: the whole checkpoint) is written or has failed."""
        if self._thread is None:
            return
        seen = self._moved
        while self._thread.is_alive():
            self._thread.join(1.0)
            if self._moved != seen:
                seen = self._moved
                self._moves()
            if self._thread.is_alive() and time.monotonic() - self._moved > self._deadline_s + GRACE_S:
                raise DeadlineExceeded(
                    f"rank {self._rank} has waited {self._deadline_s:g} s for a part of the checkpoint of step "
                    f"{self._step}; is the disk that slow? save less often (checkpoint.every_*) or raise "
                    "runtime.deadline_s"
                )
        self._thread = None

    def error(self) -> str | None:
        """Rank 0, after :meth:`join`: why the last save failed; None if it did not."""
        return None if self._error is None else str(self._error)

    def take_notes(self) -> list[str]:
        """Rank 0: warnings since the last call."""
        taken, self._notes = self._notes, []
        return taken

    def _write(self, step: int, states: dict[int, dict[str, Tensor]], document: Document | None) -> None:
        """The thread."""
        outcome: dict[str, Any]
        try:
            files: Files = {}
            for index, state in states.items():
                files |= checkpoint.write_module(checkpoint.partial_folder(self._checkpoints, step), index, state)
                self._moved = time.monotonic()
            outcome = {"files": files}
        except BaseException as error:  # torch's CheckpointException is no Exception
            outcome = {"error": f"rank {self._rank}: {_cause(error)}"}
        if document is None:
            assert self._store is not None
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

    def _publish(self, step: int, outcome: dict[str, Any], document: Document) -> None:
        outcomes = [outcome, *self._collect(step)]
        errors = [part["error"] for part in outcomes if "error" in part]
        if errors:
            raise SaveFailed("; ".join(errors))
        files = {name: entry for part in outcomes for name, entry in part["files"].items()}
        manifest, history = document.contents()
        checkpoint.publish(self._checkpoints, step, files, manifest, document.config_toml, history)
        checkpoint.remove_old(self._checkpoints, step, self._settings.keep, self._settings.keep_best)

    def _collect(self, step: int) -> list[dict[str, Any]]:
        """The outcomes of the other ranks."""
        keys = [_key(step, rank) for rank in self._ranks if rank != self._rank]
        if not keys:
            return []
        assert self._store is not None
        missing = keys
        while missing:  # store.wait would block in C++, and print warnings when it times out
            there = [key for key in missing if self._store.check([key])]
            if there:
                self._moved = time.monotonic()
                missing = [key for key in missing if key not in there]
            elif time.monotonic() - self._moved > self._deadline_s:
                late = [key.rpartition("/")[2] for key in missing]
                raise SaveFailed(f"rank {', '.join(late)} did not save its part within {self._deadline_s:g} s")
            else:
                time.sleep(POLL_S)
        texts = [json.loads(text) for text in self._store.multi_get(keys)]
        for key in keys:
            self._store.delete_key(key)
        return texts


def _key(step: int, rank: int) -> str:
    return f"saved/{step}/{rank}"


def _cause(error: BaseException) -> str:
    if isinstance(error, LocalpipeError):
        return str(error)
    root = error
    if isinstance(error, CheckpointException):
        root, _ = next(iter(error.failures.values()))
    return " ".join(f"{type(root).__name__}: {root}".split())[:300]
