"""Segmentation of generated scenes: it learns on two ranks what it learns on one, and is evaluated in several views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_spawn import run_ranks
from torch import Tensor, nn

from pipeline import Classification, ConfigError, evaluate, load_config, read_metrics, train
from pipeline.base.data_config import DataConfig
from pipeline.data import open_data
from pipeline.local.segmentation import resized
from pipeline.run.views import outputs_of, views_of

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


class Marked(nn.Module):
    """In place of a local module: scores that show what it was given."""

    def evaluate(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x = inputs["x"]
        return inputs, {"final": torch.cat([x[:, :1], -x[:, :1]], dim=1)}


def test_views_are_turned_back_before_they_are_averaged() -> None:
    x = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 16, 24, dtype=torch.uint8)
    modules: Any = [Marked()]
    (plain,) = outputs_of(modules, {"x": x}, target)
    (both,) = outputs_of(modules, {"x": x}, target, ((1.0, False), (1.0, True)))
    assert both["final"].softmax(dim=1).allclose(plain["final"].softmax(dim=1), atol=1e-6)
    (half,) = outputs_of(modules, {"x": x}, target, ((0.5, False),))
    small = F.interpolate(x, size=(8, 16), mode="bilinear", align_corners=False)[:, :1]  # 12 is no multiple of 8
    wanted = resized(torch.cat([small, -small], dim=1), target).softmax(dim=1)
    assert half["final"].exp().allclose(wanted, atol=1e-6)


@pytest.mark.long
def test_an_evaluation_in_several_views_is_no_worse(run: Path) -> None:
    plain = evaluate(run, network=network()).test_metrics["mean_iou_pct"]
    views = evaluate(run, ["data.test_flip=true", "data.test_scales=[1.0, 1.25]"], network=network())
    assert views.test_metrics["mean_iou_pct"] > plain - 2.0 and views.images == 128


def test_views_are_for_classes_of_pixels() -> None:
    with pytest.raises(ConfigError, match="not for Classification"):
        views_of(DataConfig(test_flip=True), Classification(10, (3, 32, 32)))


def test_scenes_are_the_same_everywhere_and_have_all_classes() -> None:
    first, second = open_data("shapes"), open_data("shapes")
    index = torch.arange(4)
    assert torch.equal(first.train.images(index), second.train.images(index))
    assert not torch.equal(first.train.images(index), first.test.images(index))
    assert torch.equal(first.test.labels.unique(), torch.arange(4, dtype=torch.uint8))
    assert (first.image_shape, first.classes[0]) == ((3, 32, 32), "ground")
