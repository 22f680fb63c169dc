"""The doctor among real ranks: one that answers slowly, one that dies, one that hangs, a clock that is ahead."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_spawn import RankResult, run_ranks

from pipeline import Diagnosis, diagnose, load_config
from pipeline.doctor.finding import Finding, Level
from pipeline.edges.transport import Sender

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="a dead process is recognised by /proc")

SECONDS = 0.6
DEADLINE_S = 3.0
ENDS_WITHIN_S = 10.0
HANG_S = 60.0
DELAY_S = 0.1
"""Of each answer; far more than this machine ever takes for one."""
AHEAD_S = 5.0


def job(rank: int, fault: str, folder: str, sized: bool = False) -> Diagnosis:
    """The doctor on one rank. Rank 2 has the fault, where there is one."""
    os.chdir(folder)
    if rank == 2 and fault:
        _break(fault)
    keys = ["runtime.device=cpu", "runtime.threads=1", "method.name=dgl", "data.batch_size=8", "model.cuts=auto"]
    keys.append(f"runtime.deadline_s={DEADLINE_S if fault == 'hang' else 30.0}")
    return diagnose(load_config(assignments=keys), seconds=SECONDS, sized=sized)


def _break(fault: str) -> None:
    send, clock = Sender.send, time.time
    answers = 0

    def broken(sender: Sender, header: Any, **tensors: Any) -> None:
        nonlocal answers
        if sender.spec.fields[0].name == "gradient":
            answers += 1
            if fault == "slow":
                time.sleep(DELAY_S)
            elif fault in ("die", "hang") and answers == 3:
                Path("fault").write_text(str(clock()))
                os.kill(os.getpid(), signal.SIGKILL) if fault == "die" else time.sleep(HANG_S)
        send(sender, header, **tensors)

    Sender.send = broken  # type: ignore[method-assign]
    if fault == "ahead":
        time.time = lambda: clock() + AHEAD_S


def about(diagnosis: Diagnosis, subject: str) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.subject == subject]


def healthy(results: list[RankResult]) -> Diagnosis:
    """What rank 0 has found."""
    assert [result.exit_code for result in results] == [0] * len(results), [result.stderr for result in results]
    diagnosis = results[0].value
    assert isinstance(diagnosis, Diagnosis) and diagnosis.fit, diagnosis
    return diagnosis


def line_of(results: list[RankResult]) -> str:
    lines = [line for result in results for line in result.stderr.splitlines() if line.startswith("localpipe:")]
    assert len(lines) == 1, [result.stderr for result in results]
    return lines[0]


def test_a_pair_whose_answers_are_slow_is_named(tmp_path: Path) -> None:
    diagnosis = healthy(run_ranks(job, 3, "slow", str(tmp_path)))
    first, second = diagnosis.pairs
    assert second.latency_s >= DELAY_S / 2 > 2 * first.latency_s
    named = [finding for finding in about(diagnosis, "slow pair") if finding.text.startswith("rank 1 <-> rank 2: ")]
    assert len(named) == 1 and named[0].level is Level.WARNING
    assert "latency" in named[0].text and "GB/s up" in named[0].text


def test_neighbours_have_the_messages_of_the_recipe_and_clocks_are_compared(tmp_path: Path) -> None:
    diagnosis = healthy(run_ranks(job, 3, "ahead", str(tmp_path), True))
    # ResNet-32, K = 4, on 2 + 1 + 1 modules: layer2 and layer3, 8 images in fp32 or bf16, labels beside them
    down = [pair.down_bytes for pair in diagnosis.pairs]
    assert down[0] > down[1] > 8 * 64 and all(pair.down_bytes_per_s > 0 for pair in diagnosis.pairs)
    skews = {clock.rank: clock for clock in diagnosis.clocks}
    assert abs(skews[2].ahead_s - AHEAD_S) <= skews[2].error_s
    assert abs(skews[1].ahead_s) <= skews[1].error_s
    (clocks,) = about(diagnosis, "clocks")
    assert clocks.level is Level.WARNING and clocks.text.startswith("rank 2 is ") and "NTP" in clocks.fix
    (neighbours,) = about(diagnosis, "neighbours")
    assert neighbours.text.startswith("2 pairs, median: latency ")
    (versions,) = about(diagnosis, "versions")
    assert versions.level is Level.OK


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_rank_that_does_not_answer_ends_the_check_with_one_line_that_names_the_pair(
    fault: str, tmp_path: Path
) -> None:
    results = run_ranks(job, 3, fault, str(tmp_path))
    ends_s = ENDS_WITHIN_S + (0 if fault == "die" else DEADLINE_S)
    assert time.time() - float((tmp_path / "fault").read_text()) < ends_s
    assert all(result.exit_code != 0 for result in results) and results[0].exit_code == 1
    line = line_of(results)
    assert "rank 1 <-> rank 2" in line, line
    assert {"die": "died without a message", "hang": "has been at"}[fault] in line
