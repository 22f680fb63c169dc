"""Training over edges whose payload a device carries, beside gloo alone: the same weights, and no wait without an end.

The device is the stand-in of ``helpers_spinning``. Every rank waits for all of it before every action, where a GPU may
do so by itself: cudaFree after an allocation that failed, the first launch of a kernel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers_spinning as spinning
import pytest
import torch
from helpers_spawn import RankResult, run_ranks
from mirror import mirror
from tiny import Batches, network, tiny_config

import pipeline.ranks.runtime
from pipeline import Config, LoaderData, train
from pipeline.stage.schedule import Action

RANKS = 3
LIMIT_S = 20.0
"""For a wait that ends when a payload has crossed, or never."""


def configs() -> dict[str, Config]:
    """One of every way in which messages travel."""
    often: dict[str, Any] = {"checkpoint": {"every_steps": 2}, "train": {"epochs": 2}}
    return {
        "exact": tiny_config("infopro", "hpff", 2, schedule={"micro_batches": 2}, **often),
        "async, weights upstream": tiny_config(mirror(2, 3), "plain", 2, 3, schedule={"kind": "async"}, **often),
        "free": tiny_config("dgl", "plain", 1, schedule={"kind": "free", "ring": 2}, train={"epochs": 2}),
    }


def train_both_ways(rank: int, folder: str) -> dict[str, dict[str, str]]:
    """Digests of the weights, by backend; of `free`, whose are those of no other run, only by the device."""
    spinning.register()
    choose = pipeline.ranks.runtime.choose_device
    weights: dict[str, dict[str, str]] = {}
    for name, config in configs().items():
        weights[name] = {}
        for backend in (spinning.SPINNING,) if name == "free" else ("gloo", spinning.SPINNING):
            pipeline.ranks.runtime.choose_device = (
                choose if backend == "gloo" else lambda *request: (torch.device("cpu"), spinning.SPINNING)
            )

            def wait(step: int, action: Action) -> None:
                spinning.device_wide_wait(LIMIT_S)

            summary = train(
                config,
                network=network(),
                data=LoaderData(Batches(), Batches()),
                run_dir=Path(folder) / f"{name}-{backend}",
                quiet=True,
                before_action=wait,
            )
            weights[name][backend] = summary["weights_sha256"]
    assert spinning.launched > 0
    return weights


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[RankResult]:
    results = run_ranks(train_both_ways, RANKS, str(tmp_path_factory.mktemp("spinning")), timeout_s=150)
    assert [result.exit_code for result in results] == [0] * RANKS, [result.stderr for result in results]
    return results


@pytest.mark.parametrize("name", ["exact", "async, weights upstream"])
def test_weights_are_the_same_to_the_bit(ranks: list[RankResult], name: str) -> None:
    found = ranks[0].value[name]
    assert found["gloo"] == found[spinning.SPINNING]


def test_the_replay_ring_ends_its_epochs(ranks: list[RankResult]) -> None:
    assert ranks[0].value["free"][spinning.SPINNING]
