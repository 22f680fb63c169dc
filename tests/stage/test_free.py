"""Schedule `free`: stages go at their own pace, for real: a slow one passes batches by, a fast one uses them again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from helpers_spawn import run_ranks
from tiny import Batches, network, tiny_batch, tiny_config

from pipeline import ConfigError, LoaderData, read_metrics, read_trace, train
from pipeline.stage.schedule import Action, Kind

BATCHES = 24
SLOW = 1


class ManyBatches(Batches):
    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        for step in range(BATCHES):
            batch = tiny_batch(step, self.batch_size)
            yield batch.image, batch.labels


def train_with_a_slow_stage(rank: int, folder: str, max_uses: int) -> dict[str, Any]:
    """Stage 1 needs three times as long as the others, by sleeping; the sleeps dwarf the arithmetic."""

    def before_action(step: int, action: Action) -> None:
        if action.kind is Kind.FORWARD:
            time.sleep(0.09 if rank == SLOW else 0.03)

    schedule = {"kind": "free", "ring": 2, "max_uses": max_uses}
    return train(
        tiny_config("dgl", "plain", 1, 3, schedule=schedule, train={"epochs": 2}),
        network=network(),
        data=LoaderData(ManyBatches(), Batches()),
        run_dir=Path(folder) / "run",
        quiet=True,
        before_action=before_action,
        trace=True,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("free")
    results = run_ranks(train_with_a_slow_stage, 3, str(folder), 0, timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    return results[0].value, folder / "run"


def test_a_slow_stage_passes_batches_by_and_slows_nobody(run: tuple[dict[str, Any], Path]) -> None:
    first, slow, last = run[0]["ranks"]
    assert first["steps"] == 2 * BATCHES and first["reused"] == first["skipped"] == 0
    assert slow["steps"] < 0.7 * first["steps"]
    assert slow["skipped"] > 0.2 * first["steps"]
    assert last["steps"] > slow["steps"]


def test_a_stage_behind_a_slow_one_trains_again_on_what_it_has(run: tuple[dict[str, Any], Path]) -> None:
    last = run[0]["ranks"][2]
    assert last["reused"] > 0.2 * last["steps"]


def test_a_stage_that_may_use_a_batch_once_waits_and_still_ends_its_epochs(tmp_path: Path) -> None:
    """Behind the slow stage it has used up its ring whenever an epoch ends."""
    results = run_ranks(train_with_a_slow_stage, 3, str(tmp_path), 1, timeout_s=60)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    _, slow, last = results[0].value["ranks"]
    assert last["reused"] == 0 and last["held_back"] > 0
    assert last["steps"] <= slow["steps"]


def test_every_batch_is_read_skipped_or_left_in_the_ring(run: tuple[dict[str, Any], Path]) -> None:
    ranks = run[0]["ranks"]
    for sender, reader in zip(ranks, ranks[1:], strict=False):
        left = sender["steps"] - (reader["steps"] - reader["reused"]) - reader["skipped"]
        assert 0 <= left <= 3  # two in the ring and one that came late


def test_tests_see_every_image_and_epochs_stay_together(run: tuple[dict[str, Any], Path]) -> None:
    epochs = read_metrics(run[1] / "metrics.jsonl")
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    tested = sum(len(batch[1]) for batch in Batches())
    for epoch in epochs:
        wrong = epoch["test_error_pct"] * tested / 100
        assert wrong == pytest.approx(round(wrong), abs=1e-6)  # every image once: a share of exactly that many


def test_the_trace_has_every_rank_on_one_clock(run: tuple[dict[str, Any], Path]) -> None:
    events = read_trace(run[1] / "trace.json")
    forwards = [event for event in events if event.kind == "F"]
    assert {event.rank for event in forwards} == {0, 1, 2}
    firsts = [min(e.start_s for e in forwards if e.rank == rank) for rank in range(3)]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize(
    ("span", "micro_batches", "words"),
    [(2, 1, "use hierarchy.cascade_span=1 or schedule.kind=async"), (1, 2, "use schedule.micro_batches=1")],
)
def test_what_cannot_be_free_is_refused_with_the_reason(span: int, micro_batches: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_config("dgl", "plain", span, 3, schedule={"kind": "free", "micro_batches": micro_batches})
