"""Settings shared by all tests: one thread per process, so that float32 results are bitwise reproducible."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
