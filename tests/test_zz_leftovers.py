"""The last test: nothing that the others have started or written is still there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest
from leftovers import (
    MARK,
    SHARED_MEMORY,
    Before,
    files_of_checkout,
    listening_ports,
    open_socket,
    processes,
    shared_memory,
)

NOT_OURS = ("torchelastic_", "torchinductor_", "pymp-")
"""Of torchrun, which leaves it when a signal has ended it; torch.compile's cache; multiprocessing's own, until this
process ends."""


def within(seconds: float, nothing: Callable[[], list[str]]) -> list[str]:
    """What is still found after some time: an ended process takes a moment to be gone."""
    end = time.monotonic() + seconds
    while (found := nothing()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def test_leftovers_would_be_found(before: Before) -> None:
    session = os.environ[MARK]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert any(entry.startswith(f"{process.pid} ") for entry in processes(session))
        process.communicate(b"\n")
    with open_socket() as listener:
        assert listener.getsockname()[1] in listening_ports()
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK):
        with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY) as file:
            assert Path(file.name).name in shared_memory(before.began)


def test_nothing_is_left_behind(before: Before, request: pytest.FixtureRequest) -> None:
    if getattr(forkserver._forkserver, "_forkserver_pid", None) is not None:
        forkserver._forkserver._stop()  # of helpers_spawn; it lives as long as the session
    resource_tracker._resource_tracker._stop()
    assert within(20.0, lambda: processes(os.environ[MARK])) == []
    assert listening_ports() == []
    assert shared_memory(before.began) == []
    left = sorted(path.name for path in before.temporary.iterdir())
    assert [name for name in left if not name.startswith(NOT_OURS)] == []
    assert sorted(files_of_checkout() - before.files) == []
