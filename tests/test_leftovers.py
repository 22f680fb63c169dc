"""What is left behind after the last test (see conftest.py) would be found."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from leftovers import (
    MARK,
    ROOT,
    SHARED_MEMORY,
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


def test_a_file_is_found(before: Before) -> None:
    with tempfile.NamedTemporaryFile(dir=ROOT / "tests") as file:
        assert Path(file.name) in files_of_checkout()
        assert file.name in left_by_all(before)["files"]
