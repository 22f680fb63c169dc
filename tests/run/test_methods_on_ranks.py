"""Methods that are a file of their own, heads on tokens, heads for large images: two and four ranks train the weights
of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_spawn import run_ranks
from tiny import Batches, network
from tiny_features import configured, feature_batches, image_batches, transformer, vision_transformer
from tiny_strided import CASES as STRIDED_CASES
from tiny_strided import trained_on_strided
from tiny_text import CASES as TEXT_CASES
from tiny_text import trained_on_text
from torch import nn

from pipeline import LoaderData, train

CUT: dict[str, dict[str, Any]] = {"model": {"cuts": [f"encoder.layers.encoder_layer_{i}" for i in (1, 2, 3)]}}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, dict[str, Any]]]] = {
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
    "greedy, level weights": (
        network, Batches, {"hierarchy": {"cascade_span": 2, "cascade_weight": [1.0, 0.1]}, "train": {"epochs": 2}}
    ),
    "greedy, muon, async": (
        network,
        Batches,
        {"optim": {"name": "muon", "lr": 0.01, "error_feedback": True}, "schedule": {"kind": "async"}},
    ),
    "greedy, accumulate": (network, Batches, {"train": {"epochs": 1, "accumulate": 2}, "schedule": {"kind": "async"}}),
    "greedy, ema": (network, Batches, {"train": {"epochs": 1, "ema": 0.5}}),
    "auglocal": (network, Batches, {"patches": {"grid": 2, "at_once": 1}}),
    "deinforeg": (network, Batches, {"method": {"feature_dim": 8}}),
    "deinforeg, patches": (network, Batches, {"method": {"feature_dim": 8}, "patches": {"grid": 2, "at_once": 1}}),
    "lopt": (transformer, feature_batches, {}),
    "lopt, parts, async": (
        transformer, feature_batches, {"patches": {"grid": 3, "at_once": 1}, "schedule": {"kind": "async"}}
    ),
    "greedy, sgr, tokens": (
        transformer, feature_batches, {"method": {"reconciliation": 0.01}, "hierarchy": {"cascade_span": 1}}
    ),
    "infopro, tokens": (
        vision_transformer, image_batches, {"method": {"feature_dim": 8}, "patches": {"grid": 2, "at_once": 4}, **CUT}
    ),
    "predsim, tokens, async": (
        vision_transformer, image_batches, {"patches": {"grid": 2, "at_once": 1}, "schedule": {"kind": "async"}, **CUT}
    ),
    "auglocal, tokens": (
        vision_transformer, image_batches, {"patches": {"grid": 2, "at_once": 1}, "model": {"cuts": "even"}}
    ),
}


THREE_RANKS = ("dgl, sgr", "infopro, man++", "greedy, man, async", "lopt")


def trained(rank: int, folder: str) -> dict[str, Any]:
    """The digest of the weights of every case, and what the test of their averages says; of text the perplexity."""
    on_text = trained_on_text(rank, Path(folder) / "text")
    found: dict[str, Any] = {f"text, {case}": result for case, result in on_text.items()}
    return found | trained_on_cases(rank, folder, tuple(CASES))


def trained_on_cases(rank: int, folder: str, cases: tuple[str, ...]) -> dict[str, Any]:
    """Likewise of some, and of the heads for large images."""
    on_strided, found = trained_on_strided(rank, folder), {}
    for case in cases:
        build, batches, sections = CASES[case]
        method = {"name": case.split(",")[0], **sections.get("method", {})}
        rest = {name: section for name, section in sections.items() if name != "method"}
        config = configured(2, method, **{"train": {"epochs": 1}, "checkpoint": {"every_epochs": 0}, **rest})
        data = LoaderData(batches(), batches())
        summary = train(config, network=build(), data=data, run_dir=Path(folder) / case, quiet=True)
        found[case] = f"{summary['weights_sha256']} {summary['ema_metrics']}"
    return found | on_strided


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process trains."""
    return trained(0, str(tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=[pytest.mark.slow, pytest.mark.every]), 4])
def test_the_weights_are_those_of_one_process(alone: dict[str, Any], ranks: int, tmp_path: Path) -> None:
    assert len(set(alone.values())) == len(CASES) + len(TEXT_CASES) + len(STRIDED_CASES)
    results = run_ranks(trained, ranks, str(tmp_path), timeout_s=120)
    assert [result.exit_code for result in results] == [0] * ranks, [result.stderr for result in results]
    assert results[0].value == alone


def test_three_ranks_train_the_same_weights_with_heads_for_large_images_and_messages_of_methods(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    results = run_ranks(trained_on_cases, 3, str(tmp_path), THREE_RANKS, timeout_s=120)
    assert [result.exit_code for result in results] == [0] * 3, [result.stderr for result in results]
    assert results[0].value == {case: alone[case] for case in (*STRIDED_CASES, *THREE_RANKS)}
