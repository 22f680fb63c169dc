"""Segmentation of generated scenes: it learns on two ranks what it learns on one, and is evaluated in several views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from torch import nn

from pipeline import evaluate, load_config, read_metrics, train
from pipeline.data import open_data

SETTINGS = [
    "data.name=shapes", "data.batch_size=16", "model.modules=2", "model.cuts=even", "method.name=infopro",
    "hierarchy.cascade_span=2", "patches.grid=2", "patches.at_once=4", "optim.schedule=poly", "optim.warmup_epochs=0",
    "train.epochs=2", "partition.kind=count", "precision.compute=fp32", "log.curve=false", "runtime.threads=1",
]
BOUND = 75.0  # mean IoU, percent, after two epochs; all ground: 16


def network() -> nn.Sequential:
    """Half of the resolution, with dilation: sees 25 x 25 pixels."""
    torch.manual_seed(0)

    def conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    scores = nn.Sequential(nn.Conv2d(24, 4, 1), upsample)
    return nn.Sequential(conv(3, 16), conv(16, 24, 2), conv(24, 24, 1, 2), conv(24, 24, 1, 3), scores)


def segmented(rank: int, folder: str) -> dict[str, Any]:
    return train(load_config(assignments=SETTINGS), network=network(), run_dir=folder, quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "run"
    results = run_ranks(segmented, 2, str(folder), timeout_s=120.0)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    return folder


@pytest.mark.long
def test_scenes_are_learnt_to_a_bound_on_two_ranks(run: Path) -> None:
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["metric"]["name"] == "mean_iou_pct" and last["test_metrics"]["mean_iou_pct"] > BOUND
    heads = {name for module in last["modules"] for name in module["head_metrics"]}
    assert heads == {"independent.mean_iou_pct", "final.mean_iou_pct"}


@pytest.mark.long
def test_an_evaluation_needs_no_task_where_the_data_have_one(run: Path) -> None:
    evaluation = evaluate(run, network=network())
    assert evaluation.task == "Segmentation" and evaluation.images == 128
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert evaluation.test_metrics["mean_iou_pct"] == pytest.approx(last["test_metrics"]["mean_iou_pct"], abs=1e-6)


def test_scenes_are_the_same_everywhere_and_have_all_classes() -> None:
    first, second = open_data("shapes"), open_data("shapes")
    index = torch.arange(4)
    assert torch.equal(first.train.images(index), second.train.images(index))
    assert not torch.equal(first.train.images(index), first.test.images(index))
    assert torch.equal(first.test.labels.unique(), torch.arange(4, dtype=torch.uint8))
    assert (first.image_shape, first.classes[0]) == ((3, 32, 32), "ground")
