"""What a test session has left behind: processes, listening ports, shared memory, files."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = "LOCALPIPE_TEST_SESSION"
"""In the environment of every process that a test starts, directly or through others."""
SHARED_MEMORY = Path("/dev/shm")
NOT_OURS = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "build"}
LISTEN = "0A"


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
    """Files of this user in /dev/shm that are younger than ``since``."""
    found = []
    for path in SHARED_MEMORY.iterdir() if SHARED_MEMORY.is_dir() else ():
        try:
            state = path.stat()
        except OSError:
            continue
        if state.st_uid == os.getuid() and state.st_mtime > since:
            found.append(path.name)
    return found


def open_socket() -> socket.socket:
    """A listening socket, to see that it is found."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener
