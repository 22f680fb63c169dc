"""Methods that are a file of their own, and the heads for large images: two to four ranks train the weights of one
process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import tiny_strided
import torch
from helpers_spawn import run_ranks
from tiny import CLASSES, Batches, network
from tiny_features import configured, feature_batches, transformer
from torch import nn

from pipeline import LoaderData, train

CASES: dict[str, tuple[Callable[[], nn.Sequential], Callable[[], Any], dict[str, dict[str, Any]]]] = {
    "dgl, deepsup": (network, Batches, {"hierarchy": {"variant": "deepsup", "cascade_span": 4}}),
    "dgl, sgr": (
        network,
        Batches,
        {"method": {"reconciliation": 0.01}, "hierarchy": {"cascade_span": 1}, "schedule": {"micro_batches": 2}},
    ),
    "infopro, man++": (network, Batches, {"method": {"feature_dim": 8, "front": "man++", "average_every": 2}}),
    "greedy, man, async": (
        network, Batches, {"method": {"front": "man", "average": 0.5}, "schedule": {"kind": "async"}}
    ),
    "auglocal": (network, Batches, {"patches": {"grid": 2, "at_once": 1}}),
    "deinforeg": (network, Batches, {"method": {"feature_dim": 8}}),
    "deinforeg, patches": (network, Batches, {"method": {"feature_dim": 8}, "patches": {"grid": 2, "at_once": 1}}),
    "lopt": (transformer, feature_batches, {}),
    "lopt, parts, async": (
        transformer, feature_batches, {"patches": {"grid": 3, "at_once": 1}, "schedule": {"kind": "async"}}
    ),
}


STRIDED = (*tiny_strided.IMAGENET, "cityscapes")
RANKS = {2: (*CASES, *STRIDED), 3: (*CASES, *STRIDED), 4: STRIDED}


def seeded(network: nn.Module) -> nn.Module:
    """The same weights everywhere."""
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return network


@tiny_strided.narrow_heads
def trained(rank: int, folder: str, cases: Collection[str]) -> dict[str, str]:
    """The digest of the weights of every case."""
    found = {}
    for case in [case for case in STRIDED if case in cases]:
        dense = case == "cityscapes"
        batches = [tiny_strided.images(step, dense) for step in range(tiny_strided.BATCHES)]
        blocks = tiny_strided.dense_blocks() if dense else tiny_strided.imagenet_blocks()
        config = tiny_strided.dense_config() if dense else tiny_strided.imagenet_config(case)
        test = [(image, target % CLASSES) for image, target in batches[:1]]  # every pixel counts
        task, data = tiny_strided.SCENES if dense else None, LoaderData(batches, test)
        run = {"network": seeded(nn.Sequential(blocks)), "task": task, "data": data}
        found[case] = train(config, run_dir=Path(folder) / case, quiet=True, **run)["weights_sha256"]
    for case, (build, batches, sections) in CASES.items():
        if case not in cases:
            continue
        method = {"name": case.split(",")[0], **sections.get("method", {})}
        rest = {name: section for name, section in sections.items() if name != "method"}
        config = configured(2, method, train={"epochs": 1}, checkpoint={"every_epochs": 0}, **rest)
        data = LoaderData(batches(), batches())
        summary = train(config, network=build(), data=data, run_dir=Path(folder) / case, quiet=True)
        found[case] = summary["weights_sha256"]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process trains."""
    return trained(0, str(tmp_path_factory.mktemp("alone")), RANKS[2])


@pytest.mark.parametrize("ranks", RANKS)
def test_the_weights_are_those_of_one_process(alone: dict[str, str], ranks: int, tmp_path: Path) -> None:
    assert len(set(alone.values())) == len(CASES) + len(STRIDED)
    results = run_ranks(trained, ranks, str(tmp_path), RANKS[ranks], timeout_s=120)
    assert [result.exit_code for result in results] == [0] * ranks, [result.stderr for result in results]
    assert results[0].value == {case: alone[case] for case in RANKS[ranks]}
