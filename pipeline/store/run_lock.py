"""One job per run directory: a locked file in it, which also tells whether the directory is still there.

    .lock is ours       all is well
    nothing there       deleted, or renamed: the run goes on in a new directory of that name, with everything in it
    .lock of another    renamed, and another job has begun in its place: this one must not write there, and stops
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from pipeline.base.errors import InUseError, LocalpipeError

LOCK = ".lock"
LOCK_S = 10.0
"""Longest wait for the job before to end."""


class RunLock:
    """Keeps other jobs out of ``folder`` until it is closed or this process ends, where the file system can.

    Waits a little: a job that is being restarted ends at this moment.

    Raises:
        ConfigError: the directory is in use.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        end = time.monotonic() + LOCK_S
        while not _locked(self._file):
            if time.monotonic() > end:
                self._file.close()
                raise InUseError(
                    f"run directory '{folder}' is in use by another job; wait for its end or choose another with "
                    "--run-dir"
                )
            time.sleep(0.1)

    def lost(self) -> bool:
        """Whether the directory is no longer the one that was locked: deleted or renamed."""
        try:
            return not os.path.samestat(os.stat(self._folder / LOCK), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return True

    def renew(self) -> None:
        """Make the directory anew, and lock it.

        Raises:
            LocalpipeError: another job has been there since.
            OSError: the disk refuses.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(self._folder / LOCK, "x", encoding="utf-8")  # noqa: SIM115
        except FileExistsError:
            raise LocalpipeError(
                f"run directory '{self._folder}' was renamed, and another job has begun in its place; go on in the "
                "renamed one with --resume auto --run-dir"
            ) from None
        _locked(file)
        self._file.close()
        self._file = file

    def close(self) -> None:
        """Let others in."""
        self._file.close()


def _locked(file: IO[str]) -> bool:
    """Lock it, if nobody else has. True where there are no locks on this file system."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
