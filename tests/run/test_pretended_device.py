"""Whole runs on a device that is none (``helpers_device``), beside the CPU: the same weights, and no luck in them.

Messages travel as between two GPUs (NCCL's stand-in carries the fields) and as between ranks that share one (gloo).
With the former every rank waits for all of the device before every action, where a GPU may do so by itself: cudaFree
after an allocation that failed, the first launch of a kernel.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import helpers_device
import helpers_spinning as spinning
import pytest
from helpers_spawn import run_ranks
from mirror import mirror
from tiny import Batches, network, tiny_config

import pipeline.local.graphs
import pipeline.ranks.runtime
from pipeline import Config, LoaderData, train
from pipeline.base.validation import with_values
from pipeline.edges.wire import Slot
from pipeline.stage.schedule import Action

RANKS = 3
LIMIT_S = 20.0
"""For a wait that ends when a payload has crossed, or never."""
EXACT, LATE, LATER, FREE = "exact", "async, weights upstream", "async", "free"
BACKENDS = {"cuda": spinning.SPINNING, "cuda-shared": "gloo"}
GRAPHS = "cuda, graphs"
PRETENDED = ((EXACT, "cuda"), (LATE, "cuda"), (FREE, "cuda"), (EXACT, "cuda-shared"), (EXACT, GRAPHS), (LATER, GRAPHS))


def configs() -> dict[str, Config]:
    """One of every way in which messages travel."""
    common: dict[str, Any] = {
        "checkpoint": {"every_steps": 4},
        "train": {"epochs": 2},
        # What follows the kind of the device otherwise.
        "precision": {"compute": "fp32", "layers": "plain", "channels_last": "off"},
    }
    return {
        EXACT: tiny_config("dgl", "plain", 2, 4, schedule={"micro_batches": 2}, **common),
        LATE: tiny_config(mirror(2, 3), "plain", 2, 3, schedule={"kind": "async"}, **common),
        LATER: tiny_config("dgl", "plain", 2, 3, schedule={"kind": "async"}, **common),
        FREE: tiny_config("dgl", "plain", 1, 3, schedule={"kind": "free", "ring": 2}, **common),
    }


def wait_for_the_device(step: int, action: Action) -> None:
    spinning.device_wide_wait(LIMIT_S)


def run(name: str, way: str, run_dir: Path) -> str:
    """Digest of the weights."""
    summary = train(
        with_values(configs()[name], {"precision.cuda_graphs": way == GRAPHS}),
        network=network(),
        data=LoaderData(Batches(), Batches()),
        run_dir=run_dir,
        quiet=True,
        before_action=wait_for_the_device if way.startswith("cuda,") or way == "cuda" else None,
    )
    return str(summary["weights_sha256"])


def all_runs(rank: int, folder: str) -> dict[str, Any]:
    """Of every run the weights, the races and how often the host has waited within steps; and races without a gate."""
    found: dict[str, Any] = {f"{name}, cpu": run(name, "cpu", Path(folder) / name) for name in (EXACT, LATE, LATER)}
    pipeline.local.graphs.WARM_UP = 1
    with helpers_device.pretended() as device:
        for name, way in (*PRETENDED, (LATE, "no gate")):
            device.waits, device.waits_in_step, device.races, device.replays = Counter(), Counter(), [], 0
            backend = BACKENDS.get(way, spinning.SPINNING)
            pipeline.ranks.runtime.choose_device = lambda *request, to=backend: (helpers_device.CUDA, to)
            with patch.object(Slot, "settle", lambda slot: None) if way == "no gate" else nullcontext():
                weights = run(name, way, Path(folder) / f"{name}, {way}")
            device.look_at_freed()
            found[f"{name}, {way}"] = weights, device.races, dict(device.waits_in_step), set(device.waits)
            found[f"{name}, {way}, replays"] = device.replays
    found["launched"] = spinning.launched
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    results = run_ranks(all_runs, RANKS, str(tmp_path_factory.mktemp("pretended")), timeout_s=220)
    assert [result.exit_code for result in results] == [0] * RANKS, [result.stderr for result in results]
    return [result.value for result in results]


@pytest.mark.parametrize(("name", "way"), [each for each in PRETENDED if each[0] != FREE])
def test_weights_are_those_of_the_cpu_to_the_bit(ranks: list[dict[str, Any]], name: str, way: str) -> None:
    assert ranks[0][f"{name}, {way}"][0] == ranks[0][f"{name}, cpu"]


@pytest.mark.parametrize("name", [EXACT, LATER])
def test_every_rank_captures_its_actions_and_launches_them_again(ranks: list[dict[str, Any]], name: str) -> None:
    """While every rank waits for the whole device before every action."""
    assert all(rank[f"{name}, {GRAPHS}, replays"] > 20 for rank in ranks)
    assert all(rank[f"{EXACT}, cuda, replays"] == 0 for rank in ranks)


def test_the_replay_ring_ends_its_epochs_though_every_rank_waits_for_the_device(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0][f"{FREE}, cuda"][0]
    assert all(rank["launched"] > 0 for rank in ranks)


@pytest.mark.parametrize(("name", "way"), PRETENDED)
def test_every_two_uses_of_a_buffer_are_ordered(ranks: list[dict[str, Any]], name: str, way: str) -> None:
    for rank in ranks:
        assert rank[f"{name}, {way}"][1] == []


@pytest.mark.parametrize(("name", "way"), PRETENDED)
def test_within_a_step_the_host_waits_for_nothing_on_the_device(
    ranks: list[dict[str, Any]], name: str, way: str
) -> None:
    for rank in ranks:
        assert rank[f"{name}, {way}"][2].keys() <= {"shifted_interpolation"}  # a constant, made once


def test_a_checkpoint_waits_for_nothing_on_the_device(ranks: list[dict[str, Any]]) -> None:
    """What does is before the first step, at the end of an epoch, or at the end."""
    at_the_ends = {"Numerics.place", "Normaliser.__init__", "module_weights"}
    at_the_ends |= {"Metric.of", "Losses.means", "Telemetry.post", "_tested"}
    for rank in ranks:
        for name, way in PRETENDED:
            assert rank[f"{name}, {way}"][3] <= at_the_ends | {"shifted_interpolation"}


def test_without_the_gate_a_slot_would_be_sent_before_it_is_filled(ranks: list[dict[str, Any]]) -> None:
    assert any("Payload.send" in race for race in ranks[0][f"{LATE}, no gate"][1])
    assert any("Payload.receive" in race for race in ranks[1][f"{LATE}, no gate"][1])
