"""Starts ``job.py`` in real processes, lets it break, and says what is left.

    run_forked()        ranks from the fork server, no launcher
    run_with_agents()   torchrun's agents from the fork server, one per node; their workers are forks of them
    run_torchrun()      the command itself: seconds of imports in every process, in every attempt
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers_spawn import RankResult, run_ranks
from helpers_torchrun import run_agents
from job import main

JOB = Path(__file__).parent / "job.py"


@dataclass(frozen=True)
class Ended:
    """How a job ended. ``lines``: what localpipe itself wrote."""

    code: int
    output: str
    folder: Path

    @property
    def lines(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("localpipe:")]

    @property
    def result(self) -> dict[str, Any]:
        """What ``train`` returned on rank 0."""
        return json.loads((self.folder / "result.json").read_text())

    def alive(self) -> list[str]:
        """Processes of the job that still exist."""
        return alive(self.folder)

    def attempts(self, rank: int = 0) -> int:
        """Times that a rank was started."""
        return len(list((self.folder / "pids").glob(f"{rank}-*")))


def alive(folder: Path) -> list[str]:
    """Processes of the job in ``folder`` that still exist."""
    return [file.name for file in (folder / "pids").iterdir() if _exists(int(file.name.split("-")[1]))]


def _exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def write_job(folder: Path, faults: list[dict[str, Any]], **job: Any) -> Path:
    """FOLDER/job.json; see job.py."""
    folder.mkdir(exist_ok=True)
    defaults = {"settings": {}, "span": 2, "epochs": 2, "steps": 20, "tests": 5, "resume": "auto", "run_dir": "run"}
    defaults |= {"pause_s": 0.0, "test_pause_s": 0.0, "open_pause_s": 0.0}
    (folder / "job.json").write_text(json.dumps({**defaults, **job, "faults": faults}))
    return folder


def run_forked(folder: Path, faults: list[dict[str, Any]], ranks: int = 3, **job: Any) -> list[RankResult]:
    """The whole job in processes of the fork server, without a launcher: they start faster."""
    write_job(folder, faults, **job)
    return run_ranks(main, ranks, str(folder), timeout_s=90.0)


def line_of(results: list[RankResult]) -> str:
    """The one line about a failure that the job printed."""
    lines = [line for result in results for line in result.stderr.splitlines() if line.startswith("localpipe:")]
    assert len(lines) == 1, [result.stderr for result in results]
    return lines[0]


def run_with_agents(
    folder: Path,
    faults: list[dict[str, Any]],
    processes: list[int],
    restarts: int = 0,
    timeout_s: float = 300.0,
    least: int = 0,
    **job: Any,
) -> list[Ended]:
    """The whole job under an agent of torchrun per node, each with some processes, to its end."""
    write_job(folder, faults, **job)
    agents = run_agents(_rank_of_agent, processes, str(folder), restarts=restarts, timeout_s=timeout_s, least=least)
    return [Ended(agent.exit_code, agent.stderr, folder) for agent in agents]


def _rank_of_agent(rank: int, folder: str) -> None:
    result = main(rank, folder)
    if "stopped" in result:  # an agent that is shutting down reads no return values, and a fork would wait for that
        sys.stdout.flush()
        os._exit(0)


def run_torchrun(folder: Path, faults: list[dict[str, Any]], ranks: int, restarts: int, **job: Any) -> Ended:
    """The whole job under the command torchrun, to its end; a job that hangs is killed and fails the test."""
    write_job(folder, faults, **job)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", str(JOB), str(folder)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=300.0)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return Ended(process.returncode, output, folder)
