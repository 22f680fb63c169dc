"""kill -9 at any time: torchrun starts the workers again, they go on from the last checkpoint, the weights are those of
the run that nobody disturbed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from harness import JOB, Ended, finish, line_of, run, run_forked, start, torchrun_command, write_job

KILLS, RESTARTS = 10, 3


def kills(count: int, ranks: int) -> list[dict[str, Any]]:
    """A kill of every rank and of others by chance, at steps by chance, but each in an attempt of its own."""
    generator = random.Random()
    victims = [*range(ranks), *(generator.randrange(ranks) for _ in range(count - ranks))]
    generator.shuffle(victims)
    stride = 40 // count
    return [
        {"rank": rank, "step": stride * number + 1 + generator.randrange(2), "do": "kill"}
        for number, rank in enumerate(victims)
    ]


def test_ten_random_kills_change_nothing(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """The same command again after each of them, as a batch system does it."""
    faults = kills(KILLS, ranks=3)
    settings = {"schedule": {"kind": "async"}, "checkpoint": {"every_steps": 2}}
    for fault in faults:
        results = run_forked(tmp_path, faults, settings=settings)
        assert results[fault["rank"]].exit_code == -9, (faults, [result.stderr for result in results])
        assert "died without a message" in line_of(results)
    results = run_forked(tmp_path, faults, settings=settings)
    assert [result.exit_code for result in results] == [0, 0, 0], (faults, [result.stderr for result in results])
    assert results[0].value["weights_sha256"] == undisturbed["async"], faults


@pytest.mark.long
def test_torchrun_restarts_what_was_killed(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    faults = kills(RESTARTS, ranks=2)
    ended = run(tmp_path, faults, ranks=2, restarts=RESTARTS)
    assert ended.code == 0, (faults, ended.output)
    assert ended.attempts() == RESTARTS + 1, faults
    assert ended.result["weights_sha256"] == undisturbed["exact"], faults
    assert len(ended.lines) == RESTARTS and all("died without a message" in line for line in ended.lines)
    assert ended.alive() == []


@pytest.mark.long
def test_kills_on_two_nodes(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Two torchrun agents that meet at a port of the loopback device; a rank of one of them dies. The restart counts of
    the agents differ then."""
    from helpers_spawn import free_port

    write_job(tmp_path, [{"rank": 2, "step": 9, "do": "kill"}])
    common = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=job"]
    common += ["--max-restarts=4", "--monitor-interval=0.1", "--local-addr=127.0.0.1"]
    nodes = []
    for node, processes in ((0, 2), (1, 1)):
        command = [part for part in torchrun_command(processes) if part != "--standalone"]
        nodes.append(start([*command, *common, f"--rdzv-conf=is_host={int(node == 0)}", str(JOB), str(tmp_path)]))
    ended = [finish(node, tmp_path) for node in nodes]
    assert [end.code for end in ended] == [0, 0], [end.output for end in ended]
    assert ended[0].attempts() == 2
    assert ended[0].result["weights_sha256"] == undisturbed["exact"]
    assert ended[0].alive() == []


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


@pytest.mark.long
def test_two_jobs_at_once_do_not_mix(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    jobs = []
    for kind in ("exact", "async"):
        folder = write_job(tmp_path / kind, [], settings={"schedule": {"kind": kind}})
        jobs.append((kind, folder, start(torchrun_command(2, str(JOB), str(folder)))))
    for kind, folder, process in jobs:
        ended: Ended = finish(process, folder)
        assert ended.code == 0, ended.output
        assert ended.result["weights_sha256"] == undisturbed[kind]
