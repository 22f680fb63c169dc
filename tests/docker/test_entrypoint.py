"""Process 1 of the image and its health check, outside of an image: the same files, the same processes and signals."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="an image is Linux: /proc, sessions, orphans")

ROOT = Path(__file__).parents[2]
ENTRYPOINT = ROOT / "docker" / "entrypoint.py"
ENTRY: dict[str, Any] = runpy.run_path(str(ENTRYPOINT))
HEALTH: dict[str, Any] = runpy.run_path(str(ROOT / "docker" / "healthcheck.py"))
START_S = 120.0
SUBREAPER = """
import ctypes, runpy, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here, as they come to process 1
sys.exit(runpy.run_path(sys.argv[1])["watch_over"](sys.argv[2:]))
"""
LEAVE_AN_ORPHAN = """
import os, sys, time
read, write = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(write, str(os.getpid()).encode())
    os._exit(0)
os.wait()
orphan = os.read(read, 20).decode()
end = time.monotonic() + 20
while os.path.exists(f"/proc/{orphan}") and time.monotonic() < end:
    time.sleep(0.02)
sys.exit(7 if not os.path.exists(f"/proc/{orphan}") else 1)
"""


def watched(*command: str) -> subprocess.Popen[str]:
    """The process that watches over ``command`` as process 1 would."""
    words = [sys.executable, "-c", SUBREAPER, str(ENTRYPOINT), *command]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("", "train --nproc auto"),
        ("--recipe R --set train.seed=1", "train --nproc auto --recipe R --set train.seed=1"),
        ("train --quiet", "train --nproc auto --quiet"),
        ("--nproc 2 --quiet", "train --nproc 2 --quiet"),
        ("train --nproc=2", "train --nproc=2"),
        ("plan --ranks 4", "plan --ranks 4"),
        ("doctor --nproc 2", "doctor --nproc 2"),
        ("evaluate /runs/mine", "evaluate /runs/mine"),
        ("export /runs/mine --output /runs/mine.pt", "export /runs/mine --output /runs/mine.pt"),
    ],
)
def test_words_are_those_of_localpipe(words: str, command: str) -> None:
    assert ENTRY["command_of"](words.split()) == ([sys.executable, "-m", "pipeline", *command.split()], True)


def test_every_command_of_localpipe_is_one_of_the_image() -> None:
    assert set(ENTRY["COMMANDS"]) == {command.__name__.rpartition(".")[2] for command in main.COMMANDS}


def test_any_other_word_is_a_program_in_the_place_of_this_one() -> None:
    words = [sys.executable, str(ENTRYPOINT), "sh", "-c", "echo $$ $0 $1", "a b", "--recipe"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=60)[0] == f"{process.pid} a b --recipe\n"
    done = subprocess.run([*words[:2], "no-such-word"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (127, "localpipe: no-such-word: No such file or directory\n")


def test_orphans_are_waited_for_and_the_exit_code_is_that_of_the_child() -> None:
    process = watched(sys.executable, "-c", LEAVE_AN_ORPHAN)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 7, output


def test_a_child_that_a_signal_ends_has_the_exit_code_of_a_shell() -> None:
    process = watched("sh", "-c", "kill -KILL $$")
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_the_child_has_its_time(number: signal.Signals) -> None:
    """Also where the terminal sends it to the whole group of processes, and where it was ignored before."""
    name = number.name.removeprefix("SIG")
    words = ["sh", "-c", f"trap 'echo told; n=1' {name}; echo ready; while [ -z \"$n\" ]; do sleep 0.05; done; exit 3"]
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' {name}; exec \"$@\"", "sh", sys.executable, "-c", SUBREAPER, str(ENTRYPOINT), *words],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    assert process.communicate(timeout=60)[0] == "told\n"
    assert process.returncode == 3


# -- the health check ------------------------------------------------------------------------------------------------


def put(proc: Path, pid: int, parent: int, state: str = "S", **environment: object) -> None:
    """A process in a directory like /proc."""
    folder = proc / str(pid)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{name}={value}\0" for name, value in environment.items() if state != "Z")
    (folder / "environ").write_text(f"PATH=/bin\0{text}")
    (folder / "stat").write_text(f"{pid} (a) name) {state} {parent} 1 1 0 -1")


def health(proc: Path, capsys: pytest.CaptureFixture[str]) -> str:
    code = HEALTH["main"](proc)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and code == line.startswith("unhealthy: ")
    return line.rstrip()


def test_health_is_that_of_the_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, 1, 0)
    put(tmp_path, 7, 1)
    (tmp_path / "self").mkdir()
    assert health(tmp_path, capsys) == "healthy: 0 ranks"  # starting, or waiting for another node
    for rank in range(3):
        put(tmp_path, 10 + rank, 7, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=3)
    put(tmp_path, 20, 10, "T", LOCAL_RANK=0, LOCAL_WORLD_SIZE=3)  # a worker of a DataLoader has the same environment
    assert health(tmp_path, capsys) == "healthy: 3 ranks"
    put(tmp_path, 12, 7, "T", LOCAL_RANK=2, LOCAL_WORLD_SIZE=3)
    assert health(tmp_path, capsys) == "unhealthy: these ranks are stopped: 2"
    put(tmp_path, 11, 7, "Z")
    assert health(tmp_path, capsys) == "unhealthy: of 3 ranks here, these are missing: 1"


# -- a real job --------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of thousands of steps, two ranks on the CPU."""
    settings = ["data.batch_size=16", "train.epochs=1000", "checkpoint.every_steps=2", "runtime.device=cpu"]
    settings += ["model.cuts=even", "patches.at_once=4", "partition.kind=count", "log.curve=false"]  # no counts
    words = ["--nproc", "2", "--run-dir", "run", *(word for pair in settings for word in ("--set", pair))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ENTRYPOINT), *words], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )
    yield process
    for pid in [process.pid, *family(process.pid)]:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def family(pid: int) -> list[int]:
    """All processes below ``pid``."""
    try:
        children = [int(word) for task in Path(f"/proc/{pid}/task").iterdir()
                    for word in (task / "children").read_text().split()]
    except OSError:
        return []
    return [*children, *(below for child in children for below in family(child))]


def until(true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + START_S
    while not true():
        assert process.poll() is None and time.monotonic() < end, process.stdout and process.stdout.read()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stop_of_the_container_saves(
    job: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"

    def saved() -> list[int]:
        return sorted(int(path.name[5:]) for path in checkpoints.glob("step-*") if path.name[5:].isdigit())

    until(saved, job)
    proc = tmp_path / "proc"  # of this container
    proc.mkdir()
    below = family(job.pid)
    for pid in below:
        (proc / str(pid)).symlink_to(f"/proc/{pid}")
    assert health(proc, capsys) == "healthy: 2 ranks"
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    stopped = next(line for line in output.splitlines() if line.startswith("localpipe: stopped by SIGTERM"))
    assert f"step-{saved()[-1]:08d}" in stopped
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]
