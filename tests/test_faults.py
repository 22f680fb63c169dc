"""A rank that dies, raises or hangs in the middle of a step: everything ends, with one line that names it.

Real processes under torchrun, real signals.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ENDS_WITHIN_S = 10.0


def torchrun(*arguments: str, ranks: int = 3, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)


def message(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that localpipe printed."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("localpipe:")]
    assert len(lines) == 1, result.stderr[-4000:]
    return lines[0]


def alive(folder: Path) -> list[int]:
    """Ranks whose process still exists."""
    found = []
    for file in folder.glob("pid*"):
        try:
            os.kill(int(file.read_text()), 0)
        except ProcessLookupError:
            continue
        found.append(int(file.name.removeprefix("pid")))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "rank", "words"),
    [
        ("raise", 1, ["rank 1", "module 1", "step 3", "ValueError: boom in the middle of a step"]),
        ("raise", 0, ["rank 0", "module 0", "step 3", "ValueError"]),
        ("kill", 1, ["rank 1", "module 1", "died without a message"]),
        ("kill", 2, ["rank 2", "module 2", "died without a message"]),
    ],
)
def test_all_processes_end_with_one_message(tmp_path: Path, mode: str, rank: int, words: list[str]) -> None:
    result = torchrun(str(TESTS / "faulty_train.py"), str(tmp_path), mode, str(rank), "3")
    ended = time.time()

    assert result.returncode != 0
    line = message(result)
    for word in words:
        assert word in line
    assert ended - float((tmp_path / "failed").read_text()) < ENDS_WITHIN_S
    assert len(list(tmp_path.glob("pid*"))) == 3
    assert alive(tmp_path) == []
    if mode == "raise":
        traceback = (tmp_path / "run" / f"failure-rank{rank}.txt").read_text()
        assert "before_action" in traceback and "boom" in traceback


@pytest.mark.slow
def test_a_hung_rank_is_named_when_the_deadline_is_over(tmp_path: Path) -> None:
    result = torchrun(str(TESTS / "faulty_train.py"), str(tmp_path), "stop", "1", "3")
    ended = time.time()

    assert result.returncode != 0
    line = message(result)
    assert "rank 1 (module 1 " in line and "has not been heard of for" in line and "runtime.deadline_s = 3" in line
    assert ended - float((tmp_path / "failed").read_text()) < 3.0 + ENDS_WITHIN_S
    assert alive(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.modules=2", ["3 processes for 2 local modules", "nproc_per_node=2"]),
        ("model.modules=40", ["model.modules = 40", "17 blocks"]),
        ("data.name=cifar10", ["data.root", "cifar10"]),
        ("patches.grid=9", ["patches.grid = 9", "use at most 8"]),
    ],
)
def test_bad_input_is_refused_by_all_ranks_with_one_line(tmp_path: Path, setting: str, words: list[str]) -> None:
    train = TESTS.parent / "launch" / "train.py"
    run = ["--run-dir", str(tmp_path / "run"), "--set", "runtime.device=cpu"]
    result = torchrun(str(train), *run, "--set", setting)
    assert result.returncode != 0
    line = message(result)
    for word in words:
        assert word in line
    assert "Traceback" not in line
