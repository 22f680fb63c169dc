"""Replicas x stages: a process, or a machine, is lost; one line, and the job goes on, also with fewer replicas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Ended, run_forked, run_with_agents
from torch import Tensor

pytestmark = pytest.mark.long

JOB = {"epochs": 1, "steps": 8, "tests": 3}


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "run" / "model.pt", weights_only=True)


def test_a_lost_replica_ends_the_job_with_one_line_and_a_restart_goes_on(tmp_path: Path) -> None:
    settings = {"parallel": {"replicas": 2}}
    whole = run_forked(tmp_path / "whole", [], ranks=4, settings=settings, **JOB)
    assert [result.exit_code for result in whole] == [0] * 4, [result.stderr for result in whole]
    fault = {"rank": 3, "step": 6, "do": "kill"}
    (ended,) = run_with_agents(tmp_path / "killed", [fault], [4], restarts=1, settings=settings, **JOB)
    assert ended.code == 0, ended.output
    assert (ended.attempts(), ended.alive()) == (2, [])
    (line,) = ended.lines
    assert line.startswith("localpipe: rank 3 (replica 1, modules 2-3 (c-classifier)) died without a message")
    assert ended.result["weights_sha256"] == whole[0].value["weights_sha256"]


@pytest.mark.slow
def test_a_lost_machine_leaves_fewer_replicas_at_the_same_batch(tmp_path: Path) -> None:
    """torchrun --nnodes=1:4: each node had a replica. Three of them have 3, 3 and 2 rows of a batch of 8; BatchNorm
    sees other batches then."""
    settings = {"parallel": {"replicas": "auto", "stages": 1}}
    fault = {"rank": 2, "step": 6, "do": "kill_node"}
    nodes = run_with_agents(tmp_path, [fault], [1, 1, 1, 1], restarts=1, settings=settings, least=1, **JOB)
    first: Ended = nodes[0]
    assert first.code == 0, [node.output for node in nodes]
    assert (first.result["replicas"], first.result["world_size"], first.result["steps"]) == (3, 3, 8)
    assert (first.attempts(), first.alive()) == (2, [])
    assert all(value.isfinite().all() for value in weights(tmp_path).values() if value.is_floating_point())
