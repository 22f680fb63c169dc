"""Weights upstream on real ranks: placement, timing and a resume change nothing; a killed peer gives one line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_spawn import RankResult, run_ranks
from mirror import mirror
from tiny import Batches, network, tiny_config, tiny_plan

from pipeline import ConfigError, LoaderData, Upstream, read_metrics, train
from pipeline.local import methods
from pipeline.stage.schedule import Action, Kind

MODULES = 3
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {  # every, lag, cascade span, schedule
    "next step": (1, 1, 1, {}),
    "slow channel": (2, 3, 2, {"micro_batches": 2}),
    "late": (2, 3, 2, {"kind": "async"}),
}
SAVED_AT = 8
"""In the second of two epochs of five steps: those of 6 and, unless it is late, those after it are on their way."""


def run(case: str, folder: Path, resume: str = "auto", before: Any = None, seed: int = 7, **checkpoint: int) -> Any:
    every, lag, span, schedule = CASES[case]
    config = tiny_config(
        mirror(every, lag),
        "plain",
        span,
        MODULES,
        schedule=schedule,
        train={"epochs": 2},
        checkpoint={"every_epochs": 0, **checkpoint},
        runtime={"deadline_s": 10.0},
    )
    data = LoaderData(Batches(), Batches())
    return train(
        config, network=network(seed), data=data, run_dir=folder, resume=resume, quiet=True, before_action=before
    )


def on_rank(rank: int, folder: str, resumed_from: str) -> dict[str, str]:
    """Digests of every case, run with delays and a slow last rank, and resumed from a checkpoint of other ranks."""

    def dawdle(step: int, action: Action) -> None:
        time.sleep(0.004 * rank if action.kind in (Kind.SHARE, Kind.FORWARD) else 0.001 * (step % 2))

    found = {}
    for case in CASES:
        found[case] = run(case, Path(folder) / case, before=dawdle, every_steps=SAVED_AT)["weights_sha256"]
        saved = Path(resumed_from) / case / "checkpoints" / f"step-{SAVED_AT:08d}"
        found[f"{case}, resumed"] = run(case, Path(folder) / f"{case}, resumed", str(saved), seed=8)["weights_sha256"]
    return found


def values(results: list[RankResult]) -> Any:
    assert all(result.exit_code == 0 for result in results), [result.stderr for result in results]
    return results[0].value


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Where one process has saved every case, and the digests of their ends."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, {case: run(case, folder / case, every_steps=SAVED_AT)["weights_sha256"] for case in CASES}


def test_the_weights_are_those_of_one_process_on_two_and_three_slow_ranks_and_after_a_resume(
    alone: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, expected = alone
    assert len(set(expected.values())) == len(CASES)
    two = values(run_ranks(on_rank, 2, str(tmp_path / "two"), str(folder)))
    three = values(run_ranks(on_rank, 3, str(tmp_path / "three"), str(tmp_path / "two")))
    for case, digest in expected.items():
        for found in (two, three):
            assert found[case] == digest, case
            assert found[f"{case}, resumed"] == digest, case


def test_a_resume_in_one_process_of_what_other_ranks_had_on_their_way(
    alone: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, expected = alone
    for case, digest in expected.items():
        saved = folder / case / "checkpoints" / f"step-{SAVED_AT:08d}"
        assert run(case, tmp_path / case, str(saved), seed=8)["weights_sha256"] == digest, case


def bytes_sent(rank: int, folder: str) -> list[int]:
    """Of rank 1 in an epoch, without weights upstream, and with those of every step."""
    found = []
    for name in ("greedy", mirror(1, 1)):
        sections = {"checkpoint": {"every_epochs": 0}, "train": {"epochs": 1}}
        config = tiny_config(name, "plain", 1, MODULES, **sections)
        run_dir = Path(folder) / name
        train(config, network=network(), data=LoaderData(Batches(), Batches()), run_dir=run_dir, quiet=True)
        found.append(read_metrics(run_dir / "metrics.jsonl")[0]["stages"][1]["bytes_sent"])
    return found


def test_bytes_are_counted_and_a_method_without_it_sends_none(tmp_path: Path) -> None:
    """Rank 1 is the last one of two and has no cascade: all that it sends is 5 copies of its first block."""
    without, with_it = values(run_ranks(bytes_sent, 2, str(tmp_path)))
    assert without == 0
    parameters = sum(p.numel() for p in network()[2].parameters())
    assert 5 * 4 * parameters <= with_it <= 5 * (4 * parameters + 256)


def killed(rank: int, folder: str) -> None:
    def before(step: int, action: Action) -> None:
        if rank == 1 and action.kind is Kind.SHARE and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    run("next step", Path(folder), before=before)


def test_a_killed_peer_gives_one_line(tmp_path: Path) -> None:
    results = run_ranks(killed, 2, str(tmp_path / "run"))
    assert results[1].exit_code == -signal.SIGKILL and results[0].exit_code != 0
    lines = [line for result in results for line in result.stderr.splitlines() if line.startswith("localpipe:")]
    assert len(lines) == 1 and "rank 1" in lines[0], lines


def test_other_steps_than_the_checkpoint_had_are_refused(
    alone: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods._UPSTREAM, mirror(2, 3), Upstream(2, 4))
    saved = alone[0] / "late" / "checkpoints" / f"step-{SAVED_AT:08d}"
    with pytest.raises(ConfigError, match=r"every 2 step\(s\), lag 3, the method declares every 2 step\(s\), lag 4"):
        run("late", tmp_path, str(saved))


def test_schedule_free_has_no_common_step_and_is_refused() -> None:
    config = tiny_config(mirror(1, 1), "plain", 1, MODULES, schedule={"kind": "free"})
    with pytest.raises(ConfigError, match="schedule.kind = 'free': .* use exact or async"):
        tiny_plan(config)


@pytest.mark.parametrize(("every", "lag", "name"), [(0, 1, "every"), (1, 0, "lag"), (-1, 1, "every")])
def test_steps_that_cannot_be_declared_are_refused(every: int, lag: int, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = "):
        Upstream(every, lag)
