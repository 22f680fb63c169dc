"""Settings shared by all tests: one thread per process, so that float32 results are bitwise reproducible; a mark on
every process and a directory for temporary files, so that what is left behind is found (test_zz_leftovers.py)."""

import os
import tempfile

import pytest
import torch
from leftovers import MARK, Before

# torch asks for the name of every address it connects to. Where no name server answers, that takes five seconds of each
# connection, unless it is told not to wait so long.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def before(tmp_path_factory: pytest.TempPathFactory) -> Before:
    """How things were before the first test."""
    temporary = tmp_path_factory.mktemp("temporary", numbered=False)
    os.environ["TMPDIR"] = str(temporary)
    tempfile.tempdir = None  # look at TMPDIR again
    os.environ[MARK] = str(temporary)
    return Before.now(temporary)
