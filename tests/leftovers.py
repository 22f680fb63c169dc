"""What a test session has left behind: processes, listening ports, shared memory, files. conftest.py looks when the
last test is over, test_leftovers.py that it would be found."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = "LOCALPIPE_TEST_SESSION"
"""In the environment of every process that a test starts, directly or through others."""
TOGETHER = "LOCALPIPE_TEST_WORKERS"
"""In the environment of the workers of pytest-xdist, and of what they start: a directory that they share."""
SHARED_MEMORY = Path("/dev/shm")
NOT_OURS = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "build"}
LISTEN = "0A"
NOT_OF_TESTS = re.compile(r"torchelastic_|torchinductor_|pymp-|.*wandb-(artifacts|media)$")
"""Of torchrun, which leaves it when a signal has ended it; torch.compile's cache; multiprocessing's own, and those of
W&B, which timm imports where it is installed, until this process ends."""


@dataclass(frozen=True)
class Before:
    """The state of things when the session began."""

    began: float
    files: frozenset[Path]
    temporary: Path

    @classmethod
    def now(cls, temporary: Path) -> Before:
        return cls(time.time(), files_of_checkout(), temporary)


def files_of_checkout() -> frozenset[Path]:
    found = set()
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in NOT_OURS and not name.endswith(".egg-info")]
        found |= {Path(folder) / file for file in files}
    return frozenset(found)


def processes(session: str) -> list[str]:
    """Other processes of this session that are not about to be gone: pid and command."""
    found = []
    wanted = f"{MARK}={session}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            if (folder / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # ended meanwhile, or of another user
            continue
        found.append(f"{folder.name} {command}")
    return found


def listening_ports() -> list[int]:
    """TCP ports on which this very process listens; all others that the session had have ended."""
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:["):
            mine.add(target[8:-1])
    ports = []
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in mine:
                ports.append(int(fields[1].rpartition(":")[2], 16))
    return ports


def shared_memory(since: float) -> list[str]:
    """Files of this user in /dev/shm that are younger than ``since``, but those that processes of other test sessions,
    or of other programs, have in use: they come and go on a machine that is shared."""
    found = []
    foreign = held_by_others()
    for path in SHARED_MEMORY.iterdir() if SHARED_MEMORY.is_dir() else ():
        try:
            state = path.stat()
        except OSError:
            continue
        if state.st_uid == os.getuid() and state.st_mtime > since and state.st_ino not in foreign:
            found.append(path.name)
    return found


def held_by_others() -> set[int]:
    """Inodes in /dev/shm that are mapped or open in a process which is not of this session."""
    found: set[int] = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or _ours(folder):
            continue
        with contextlib.suppress(OSError):  # ended meanwhile, or of another user
            mapped = [line.split(maxsplit=5) for line in (folder / "maps").read_text().splitlines()]
            found |= {int(fields[4]) for fields in mapped if fields[-1].startswith(f"{SHARED_MEMORY}/")}
            for file in (folder / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    if os.readlink(file).startswith(f"{SHARED_MEMORY}/"):
                        found.add(file.stat().st_ino)
    return found


def _ours(folder: Path) -> bool:
    """Whether a process belongs to this session: this one and its descendants, other workers, and what they started."""
    marks = {f"{name}={os.environ[name]}".encode() for name in (MARK, TOGETHER)}
    with contextlib.suppress(OSError):
        if marks & set((folder / "environ").read_bytes().split(b"\0")):
            return True
        while folder.name not in ("0", "1"):
            if int(folder.name) == os.getpid():
                return True
            folder = folder.parent / (folder / "stat").read_text().rpartition(")")[2].split()[1]
    return False


def left_by_worker(before: Before) -> dict[str, list[str]]:
    """What the tests of this process have left, by kind."""
    if getattr(forkserver._forkserver, "_forkserver_pid", None) is not None:
        forkserver._forkserver._stop()  # of helpers_spawn; it lives as long as the session
    resource_tracker._resource_tracker._stop()
    temporary = sorted(path.name for path in before.temporary.iterdir())
    return {
        "processes": within(20.0, lambda: processes(os.environ[MARK])),
        "ports": [str(port) for port in listening_ports()],
        "temporary files": [name for name in temporary if not NOT_OF_TESTS.match(name)],
    }


def left_by_all(before: Before) -> dict[str, list[str]]:
    """What cannot be told apart by worker; for the last of them to look."""
    files = sorted(str(path) for path in files_of_checkout() - before.files)
    return {"shared memory": lasting(lambda: shared_memory(before.began)), "files": files}


def within(seconds: float, found: Callable[[], list[str]]) -> list[str]:
    """What is still found after some time: an ended process takes a moment to be gone."""
    end = time.monotonic() + seconds
    while (left := found()) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def lasting(found: Callable[[], list[str]]) -> list[str]:
    """What two looks find: a file of somebody else is nobody's for the moment between its creation and its use."""
    first = set(found())
    if first:
        time.sleep(0.5)
    return [name for name in found() if name in first]
