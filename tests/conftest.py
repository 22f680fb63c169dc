"""Settings shared by all tests: one thread per process, so that float32 results are bitwise reproducible; a mark on
every process and a directory for temporary files, so that what is left behind is found (see leftovers.py).

Tests run in three workers of pytest-xdist, since many of them wait most of their time. Those that are marked ``alone``
need all cores, or measure:

    worker 0:  test  test   |      test alone       |  test
    worker 1:  test     test|                       | test   test
    worker 2:    test test  |                       |test test
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from leftovers import MARK, TOGETHER, Before, left_by_all, left_by_worker

# torch asks for the name of every address it connects to. Where no name server answers, that takes five seconds of each
# connection, unless it is told not to wait so long.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[TOGETHER] = tempfile.mkdtemp()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[TOGETHER], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """One test with its fixtures: beside another one, or alone."""
    together = Path(os.environ[TOGETHER])
    with open(together / "machine", "w") as machine:
        with open(together / "gate", "w") as gate:  # who waits for the machine lets nobody pass
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(machine, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Before]:
    """How things were before the first test; fails if something is left behind after the last."""
    temporary = tmp_path_factory.mktemp("temporary", numbered=False)
    os.environ["TMPDIR"] = str(temporary)
    tempfile.tempdir = None  # look at TMPDIR again
    os.environ[MARK] = str(temporary)
    before = Before.now(temporary)
    yield before
    found = left_by_worker(before)
    together = Path(os.environ[TOGETHER])
    (together / f"done-{os.getpid()}").touch()
    if len(list(together.glob("done-*"))) == int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")):
        found |= left_by_all(before)
    assert not any(found.values()), f"left behind by the tests of this worker: {found}"
