"""Processes are recognised, and resources are counted, also where the system is not Linux (macOS): without /proc."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from tiny import Batches, network, tiny_config

from pipeline import LoaderData, train
from pipeline.ranks import process, resources
from pipeline.ranks.peers import WATCH_S
from pipeline.ranks.process import Process, reap

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(params=["proc", "ps", "signal"])
def system(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the system tells of processes."""
    if request.param != "proc":
        monkeypatch.setattr(process, "PROC", tmp_path)
    if request.param == "ps" and shutil.which("ps") is None:
        pytest.skip("needs the command ps")
    if request.param == "signal":
        monkeypatch.setenv("PATH", "")
    return request.param


def of(pid: int) -> Process:
    """As another process of this host would have published it."""
    return Process(pid, process._state(pid)[1], process._host(), "modules 0-1")


def test_a_process_is_there_until_it_has_ended(system: str) -> None:
    child = subprocess.Popen(SLEEP)
    try:
        peer = of(child.pid)
        assert not Process.current("").gone() and not peer.gone()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        assert peer.gone() == (system != "signal")
        child.wait()
        assert peer.gone()
    finally:
        child.kill()
        child.wait()


def test_a_pid_that_is_used_again_is_another_process(system: str) -> None:
    if system == "signal":
        pytest.skip("signals do not tell one from the other")
    assert Process(os.getpid(), "a minute ago", "here", "").gone()


def test_a_stopped_process_is_killed(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "REAP_S", 0.2)
    child = subprocess.Popen(SLEEP)
    try:
        child.send_signal(19)
        reap([of(child.pid)])
        assert child.wait(10) == -9
    finally:
        child.kill()
        child.wait()


def test_cores_are_those_of_the_machine_where_there_is_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resources.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert resources.usable_cores() == os.cpu_count()


def test_the_peak_is_in_bytes_on_every_system() -> None:
    assert resources._peak_resident_bytes(3, "darwin") == 3
    assert resources._peak_resident_bytes(3, "linux") == 3072
    assert resources.peak_memory_bytes(torch.device("cpu")) > 2**20


# -- a job ----------------------------------------------------------------------------------------------------------


def forget_linux() -> None:
    """Let this process see what one on macOS does: no /proc, no affinity."""

    def refuse(path: Any) -> None:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, "not on this system", path)

    def without_proc(call: Any) -> Any:
        def called(path: Any, *arguments: Any, **options: Any) -> Any:
            refuse(path)
            return call(path, *arguments, **options)

        return called

    del os.sched_getaffinity
    os.stat, os.readlink = without_proc(os.stat), without_proc(os.readlink)
    sys.addaudithook(lambda event, arguments: refuse(arguments[0]) if event == "open" else None)


def elsewhere(rank: int, folder: str) -> None:
    """A job with a trace, in which rank 1 is killed, but not before the other one has looked at it twice."""
    forget_linux()

    def before_action(step: int, action: Any) -> None:
        if rank == 1 and step == 2:
            time.sleep(2.4 * WATCH_S)
            os.kill(os.getpid(), signal.SIGKILL)

    train(
        tiny_config(modules=2, train={"epochs": 1}, runtime={"threads": 0}),
        network=network(), data=LoaderData(Batches(), Batches()), run_dir=folder, quiet=True, trace=True,
        before_action=before_action,
    )  # fmt: skip


def test_a_job_trains_and_a_death_is_told_without_linux(tmp_path: Path) -> None:
    results = run_ranks(elsewhere, 2, str(tmp_path))
    assert [result.exit_code for result in results] == [1, -9], [result.stderr for result in results]
    (line,) = [line for line in results[0].stderr.splitlines() if line.startswith("localpipe:")]
    assert line.startswith("localpipe: rank 1 (module 1 (c-classifier)) died without a message"), line
