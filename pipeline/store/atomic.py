"""Files and directories that are there as a whole or not at all, and what killed processes have left of them.

    .model.pt.4711.tmp   being written by process 4711, which holds a lock on it   -- fsync, rename -->   model.pt
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.tmp")


def temporary_of(target: Path) -> Path:
    """The neighbour of ``target`` that this process fills before it renames it."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def write_atomically(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Fill a neighbouring temporary file, then rename it: ``target`` is never half written. Raises OSError."""
    temporary = temporary_of(target)
    try:
        with open(temporary, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_directory(target: Path, files: Mapping[str, bytes]) -> None:
    """The same for a new directory of ``files``, content by name. Raises OSError."""
    temporary = temporary_of(target)
    temporary.mkdir()
    try:
        with _opened(temporary) as descriptor:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name, content in files.items():
                with open(temporary / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            os.fsync(descriptor)
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporaries(folder: Path, ours: Callable[[str], bool] = lambda name: True) -> None:
    """Remove the temporary files and directories in ``folder`` that no living process is writing.

    A process on another machine or in another container, where the pid says nothing, holds a lock. Where neither can be
    told, a file stays. ``ours``: by the name of a target, whether it is a file of this program.
    """
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match is not None and ours(match["name"]) and not _alive(int(match["pid"])):
            with contextlib.suppress(OSError), _opened(path) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # an error where it is locked, or cannot be
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The descriptor of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    """Whether another process has this number here. A process asks before it writes, so its own number is that of a
    dead one: in a container, all have the same."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True
