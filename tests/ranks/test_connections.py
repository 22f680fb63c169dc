"""Ranks that have met in the store, and whose packets to each other are lost."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist
from helpers_spawn import run_ranks

from pipeline.ranks.runtime import Runtime

DEADLINE_S = 1.0
LOST_S = 5 * DEADLINE_S
"""For which gloo goes on where nobody answers."""


def job(rank: int, lost: str) -> float:
    """Stands in for a firewall, which needs two machines: as gloo does, it says nothing meanwhile, and then little."""
    began = time.monotonic()

    def connect(*words: object, **named: object) -> None:
        time.sleep(LOST_S)
        raise RuntimeError("Gloo connectFullMesh failed with [pair.h:311] Connect timeout [none]")

    setattr(dist, lost, connect)
    with Runtime("cpu", threads=1, deadline_s=DEADLINE_S, setup_deadline_s=LOST_S):
        return time.monotonic() - began


@pytest.mark.parametrize("lost", ["init_process_group"])
def test_one_line_says_what_could_be_wrong_at_the_deadline(lost: str) -> None:
    began = time.monotonic()
    ranks = run_ranks(job, 2, lost, timeout_s=30)
    assert time.monotonic() - began < 30 and [rank.exit_code for rank in ranks] == [1, 1]
    (line,) = [line for rank in ranks for line in rank.stderr.splitlines() if line.startswith("localpipe:")]
    assert "has waited 1 s for connections with the other ranks (gloo, interface: " in line, line
    assert "firewall" in line and "GLOO_SOCKET_IFNAME" in line
