"""kill -9 at any time: torchrun starts the workers again, they go on from the last checkpoint, the weights are those of
the run that nobody disturbed."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import line_of, run_forked, run_torchrun, run_with_agents

pytestmark = pytest.mark.long

KILLS = 10


def kills(count: int, ranks: int) -> list[dict[str, Any]]:
    """A kill of every rank and of others by chance, at steps by chance, but each in an attempt of its own."""
    generator = random.Random()
    victims = [*range(ranks), *(generator.randrange(ranks) for _ in range(count - ranks))]
    generator.shuffle(victims)
    stride = 40 // count
    return [
        {"rank": rank, "step": stride * number + 1 + generator.randrange(2), "do": "kill", "attempt": number}
        for number, rank in enumerate(victims)
    ]


def test_ten_random_kills_change_nothing(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    faults = kills(KILLS, ranks=3)
    settings = {"schedule": {"kind": "async"}, "checkpoint": {"every_steps": 2}}
    (ended,) = run_with_agents(tmp_path, faults, [3], restarts=KILLS, settings=settings)
    assert ended.code == 0, (faults, ended.output)
    assert ended.attempts() == KILLS + 1, faults
    assert ended.result["weights_sha256"] == undisturbed["async"], faults
    assert len(ended.lines) == KILLS and all("died without a message" in line for line in ended.lines)
    assert ended.alive() == []


@pytest.mark.slow
def test_the_command_torchrun_restarts_what_was_killed(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    ended = run_torchrun(tmp_path, [{"rank": 1, "step": 17, "do": "kill"}], ranks=2, restarts=1)
    assert ended.code == 0, ended.output
    assert (ended.attempts(), len(ended.lines), ended.alive()) == (2, 1, [])
    assert ended.result["weights_sha256"] == undisturbed["exact"]


@pytest.mark.parametrize("job", [{"run_dir": None}, {"resume": "none"}])
def test_a_single_process_that_was_killed_goes_on_with_its_run(
    tmp_path: Path, undisturbed: dict[str, str], job: dict[str, Any]
) -> None:
    """Where it was told of no run directory, and where it was told to begin anew: that was its first attempt."""
    (ended,) = run_with_agents(tmp_path, [{"rank": 0, "step": 17, "do": "kill"}], [1], restarts=1, **job)
    assert ended.code == 0, ended.output
    assert (ended.attempts(), ended.lines, ended.alive()) == (2, [], [])
    assert ended.result["weights_sha256"] == undisturbed["exact"]
    assert len(list(tmp_path.glob("**/checkpoints"))) == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of two ranks")
def test_torchrun_restarts_what_was_killed_on_nccl(tmp_path: Path) -> None:
    fault = {"rank": 1, "step": 17, "do": "kill"}
    settings = {"runtime": {"device": "cuda", "deadline_s": 60.0}}
    whole = run_torchrun(tmp_path / "whole", [], ranks=2, restarts=0, settings=settings)
    ended = run_torchrun(tmp_path / "killed", [fault], ranks=2, restarts=1, settings=settings)
    assert (whole.code, ended.code) == (0, 0), (whole.output, ended.output)
    assert (ended.attempts(), len(ended.lines), ended.alive()) == (2, 1, [])
    assert ended.result["steps"] == whole.result["steps"]
    assert abs(ended.result["train_loss"] - whole.result["train_loss"]) < 0.05  # a GPU's sums need not be bitwise equal


def test_kills_on_two_nodes(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Two agents of torchrun that meet at a port of the loopback device; a rank of one of them dies, then one of the
    other. The restart counts of the agents differ then."""
    faults = [{"rank": 2, "step": 9, "do": "kill"}, {"rank": 0, "step": 25, "do": "kill"}]
    nodes = run_with_agents(tmp_path, faults, [2, 1], restarts=4)
    assert [node.code for node in nodes] == [0, 0], [node.output for node in nodes]
    assert nodes[0].attempts() == 3
    assert nodes[0].result["weights_sha256"] == undisturbed["exact"]
    assert nodes[0].alive() == []


@pytest.mark.parametrize("rank", [0, 2])
def test_a_kill_during_a_save_leaves_the_older_checkpoint(
    tmp_path: Path, undisturbed: dict[str, str], rank: int
) -> None:
    results = run_forked(tmp_path, [{"rank": rank, "step": 12, "do": "kill_in_save"}])
    assert results[rank].exit_code == -9
    assert f"rank {rank}" in line_of(results) and "died without a message" in line_of(results)
    folders = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    (partial,) = [name for name in folders if name.endswith(".partial")]  # of step 10, which may take so long, or 15
    assert "step-00000005" in folders

    results = run_forked(tmp_path, [])
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    assert f"localpipe warning: removed the unfinished checkpoint {partial}" in results[0].stderr
    assert results[0].value["weights_sha256"] == undisturbed["exact"]


def test_a_restart_does_not_do_what_has_been_refused(tmp_path: Path) -> None:
    """A finished run without checkpoints is not overwritten, however often torchrun starts its ranks again."""
    nothing = {"every_epochs": 0, "every_steps": 0}
    (first,) = run_with_agents(tmp_path, [], [2], steps=5, settings={"checkpoint": nothing})
    assert first.code == 0, first.output
    (again,) = run_with_agents(tmp_path, [], [2], restarts=1, steps=5, settings={"checkpoint": nothing})
    assert again.code != 0
    assert len(again.lines) == 1 and "already holds a run" in again.lines[0]  # the restart says it no second time
    assert again.attempts() == 3  # the first job, the second, and its restart
    assert again.result == first.result


def test_two_jobs_at_once_do_not_mix(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    with ThreadPoolExecutor() as pool:
        jobs = {
            kind: pool.submit(run_with_agents, tmp_path / kind, [], [2], settings={"schedule": {"kind": kind}})
            for kind in undisturbed
        }
    for kind, job in jobs.items():
        (ended,) = job.result()
        assert ended.code == 0, ended.output
        assert ended.result["weights_sha256"] == undisturbed[kind]
