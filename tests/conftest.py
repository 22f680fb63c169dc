"""Settings shared by all tests: one thread per process, so that float32 results are bitwise reproducible; a mark on
every process and a directory for temporary files, so that what is left behind is found (see leftovers.py).

Tests run in three workers of pytest-xdist, since many of them wait most of their time; a file stays in one worker.
Those that are marked ``alone`` need all cores, or measure. Their files come first, and they first within them, one
after another, so that the workers wait once for each other and not before every one; then the files that take ``long``,
so that no worker is left with one of them at the end:

    worker 0:  alone |       |       | test  long  test |  test test
    worker 1:        | alone alone   |    long  test  test  test | test
    worker 2:        |       | alone |test  test   long    | test
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
    config.option.markexpr = config.option.markexpr or "not every"
    if not hasattr(config, "workerinput"):
        os.environ[TOGETHER] = tempfile.mkdtemp()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[TOGETHER], ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order above, in every worker the same; xdist is told to keep it (--no-loadscope-reorder)."""
    marks: dict[Path, set[str]] = {}
    counts: dict[Path, int] = {}
    for item in items:
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())
        counts[item.path] = counts.get(item.path, 0) + 1

    def place(item: pytest.Item) -> tuple[bool, bool, int, Path, bool]:
        of_file = marks[item.path]
        alone = item.get_closest_marker("alone") is not None
        return "alone" not in of_file, "long" not in of_file, -counts[item.path], item.path, not alone

    items.sort(key=place)  # stable: what a file has in common is still prepared by its first test


held: list[int] = []
"""The machine, as an open file, while this worker runs a test or several that run alone."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """One test with its fixtures: beside another one, or alone; then with the next one that runs alone as well."""
    alone = item.get_closest_marker("alone") is not None
    if not held:
        held.append(take_machine(alone))
    try:
        return (yield)
    finally:
        if not (alone and nextitem is not None and nextitem.get_closest_marker("alone")):
            os.close(held.pop())


def take_machine(alone: bool) -> int:
    """Wait until no other worker runs a test, or none that is alone."""
    together = Path(os.environ[TOGETHER])
    machine = os.open(together / "machine", os.O_WRONLY | os.O_CREAT)
    with open(together / "gate", "w") as gate:  # who waits for the machine lets nobody pass
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    return machine


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
