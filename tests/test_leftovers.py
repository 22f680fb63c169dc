"""What is left behind after the last test (see conftest.py) would be found."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from leftovers import (
    MARK,
    ROOT,
    SHARED_MEMORY,
    TOGETHER,
    Before,
    files_of_checkout,
    left_by_all,
    listening_ports,
    processes,
    shared_memory,
)


def test_a_process_is_found() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert any(entry.startswith(f"{process.pid} ") for entry in processes(os.environ[MARK]))
        process.communicate(b"\n")


def test_a_port_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert listener.getsockname()[1] in listening_ports()


def test_shared_memory_is_found(before: Before) -> None:
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK):
        with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY) as file:
            assert Path(file.name).name in shared_memory(before.began)


def test_shared_memory_of_a_process_of_this_session_is_found_while_it_is_in_use(before: Before) -> None:
    with holder_of_shared_memory(dict(os.environ)) as name:
        assert name in left_by_all(before)["shared memory"]


def test_shared_memory_in_use_by_another_session_is_not_ours(before: Before) -> None:
    """Which a detached parent has started, as another shell would; what it leaves when it ends is found."""
    environment = {name: value for name, value in os.environ.items() if name not in (MARK, TOGETHER)}
    with holder_of_shared_memory(environment, "import os; os.fork() and os._exit(0)") as name:
        assert name not in left_by_all(before)["shared memory"]
        assert name in {path.name for path in SHARED_MEMORY.iterdir()}


@contextlib.contextmanager
def holder_of_shared_memory(environment: dict[str, str], first: str = "") -> Iterator[str]:
    """The name of a file in /dev/shm that another process, which does something ``first``, has open."""
    if not (SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)):
        pytest.skip("no shared memory here")
    hold = f"file = tempfile.NamedTemporaryFile(dir={str(SHARED_MEMORY)!r}); print(file.name, flush=True); input()"
    command = [sys.executable, "-c", "\n".join([first, "import tempfile", hold])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None and process.stdout is not None
        yield Path(process.stdout.readline().decode().strip()).name
        process.stdin.write(b"\n")
        process.stdin.close()
        process.stdout.read()  # until it has ended, and its file with it


def test_a_file_is_found(before: Before) -> None:
    with tempfile.NamedTemporaryFile(dir=ROOT / "tests") as file:
        assert Path(file.name) in files_of_checkout()
        assert file.name in left_by_all(before)["files"]
