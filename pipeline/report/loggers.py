"""Loggers: who else gets the records of metrics.jsonl. None of them can stop or delay a run.

    Loop --record--> metrics.jsonl
             '-----> Feed --queue--> thread --> TensorBoardLogger
             '-----> Feed --queue--> thread --> WandbLogger

A logger is opened, fed and closed on a thread of its own. One that fails, or has hung, is dropped with one warning.
"""

from __future__ import annotations

import functools
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError, warn
from pipeline.report.tensorboard_logger import TensorBoardLogger
from pipeline.report.wandb_logger import WandbLogger

HANG_S = 120.0
"""After which a logger that is still at the same thing counts as hung; to open a run over a network takes long."""
CLOSE_S = 10.0
"""How long the end of a run waits for a logger to write what it still has."""

Record = Mapping[str, Any]


class Logger(Protocol):
    """Takes the records of a run, each a line of metrics.jsonl as JSON reads it."""

    def record(self, record: Record) -> None:
        """Take the record of one epoch."""

    def close(self) -> None:
        """Write what is left, and end."""


Opener = Callable[[Path, Mapping[str, Any], Sequence[Record]], Logger]
"""(run directory, configuration, records of the run so far) -> logger."""

OPENERS: dict[str, Opener] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}


def refuse_missing_loggers(config: Config) -> None:
    """Refuse loggers in ``log.to`` whose package is not installed.

    Raises:
        ConfigError: names the logger and what to install.
    """
    for name in config.log.to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.to = {list(config.log.to)}: the package {name} is not installed; run: pip install "
                f"localpipe[{name}], or leave it out"
            )


class Loggers:
    """The loggers of a run, on the rank that writes metrics.jsonl.

    Args:
        names: of OPENERS.
        run_dir: where they keep their files.
        config: section -> key -> value.
    """

    def __init__(self, names: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._run_dir = run_dir
        self._config = config
        self._feeds: list[_Feed] = []

    def begin(self, past: Sequence[Record]) -> None:
        """Open them, for a run that has the records ``past`` so far; those that are open are closed first, as is due
        when the run directory has been made anew."""
        self.close()
        for name in self._names:
            self._feeds.append(_Feed(name, functools.partial(OPENERS[name], self._run_dir, self._config, past)))

    def record(self, record: Record) -> None:
        """Hand a record to all of them; returns at once."""
        for feed in self._feeds:
            feed.put(record)

    def close(self) -> None:
        """Close them, within CLOSE_S each."""
        feeds, self._feeds = self._feeds, []
        for feed in feeds:
            feed.end()
        limit = time.monotonic() + CLOSE_S
        for feed in feeds:
            feed.join(limit)


class _Feed:
    """One logger and its thread."""

    def __init__(self, name: str, opener: Callable[[], Logger]) -> None:
        self._name = name
        self._open = opener
        self._records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._busy_since: float | None = time.monotonic()
        self._dropped = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Queue a record, unless the logger has been dropped or hangs."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > HANG_S:
            self._drop(f"has not answered for {HANG_S:g} s")
        if not self._dropped:
            self._records.put(record)

    def end(self) -> None:
        """No record will follow."""
        self._records.put(None)

    def join(self, limit: float) -> None:
        """Wait until the logger has closed, up to the time ``limit`` (monotonic)."""
        if self._dropped:
            return
        self._thread.join(max(limit - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._drop("did not end in time; what it had not written is lost to it")

    def _work(self) -> None:
        """The thread."""
        try:
            logger = self._open()
            while (record := self._next()) is not None:
                logger.record(record)
            logger.close()
        except BaseException as error:  # some raise SystemExit, which is an end of this thread and of nothing else
            self._drop(f"failed ({type(error).__name__}: {error})")

    def _next(self) -> Record | None:
        self._busy_since = None
        record = self._records.get()
        self._busy_since = time.monotonic()
        return None if self._dropped else record

    def _drop(self, why: str) -> None:
        """Say once that the logger gets no more records."""
        with self._lock:
            told, self._dropped = self._dropped, True
        if not told:
            why = " ".join(why.split())[:300]
            warn(f"logger {self._name} {why}; the run goes on without it, metrics.jsonl has all")
