"""The cut by memory: what it takes a module for is what a step needs, and no rank needs more than with other cuts."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import Tensor, nn

from pipeline import Config, load_config
from pipeline.local.task import Classification
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan.cost_cut import cut_by_cost
from pipeline.plan.step_memory import step_memory

IMAGE, CLASSES, K = (3, 32, 32), 10, 4
TASK = Classification(CLASSES, IMAGE)
METHODS = {
    "DGL + HPFF": ["method.name=dgl", "hierarchy.cascade_span=2", "patches.grid=2", "patches.at_once=1"],
    "InfoPro + HPFF": ["method.name=infopro", "hierarchy.cascade_span=2", "patches.grid=2", "patches.at_once=1"],
}


def config(method: str, cuts: str) -> Config:
    return load_config(
        "cifar10-resnet32-bp",
        assignments=["model.name=resnet20", f"model.modules={K}", f"model.cuts={cuts}", "data.batch_size=256",
                     "precision.compute=fp32", "partition.kind=count", "runtime.queue_depth=1", *METHODS[method]],
    )  # fmt: skip


def peaks(settings: Config) -> list[int]:
    return [rank.peak for rank in step_memory(settings, IMAGE, CLASSES, K)]


@pytest.mark.parametrize("method", ["DGL + HPFF", pytest.param("InfoPro + HPFF", marks=pytest.mark.every)])
def test_the_fullest_rank_needs_less_than_with_equal_numbers_and_about_what_is_said(method: str) -> None:
    settings, words = cut_by_cost(config(method, "memory"), planned_blocks("resnet20", 3, CLASSES), TASK)
    said = [float(part) * 2**20 for part in words.removeprefix("cut by memory: ").split(" MiB")[0].split(" | ")]
    found = peaks(settings)
    assert len(said) == K and said == pytest.approx(found, rel=0.12)
    assert max(found) < 0.9 * max(peaks(config(method, "even")))


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_counted_is_cut_evenly() -> None:
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES))
    blocks = OrderedDict(a=Chooses(), b=nn.Conv2d(3, 3, 3), c=end)
    two = ["model.name=resnet20", "model.modules=2", "model.cuts=memory"]
    settings = load_config("cifar10-resnet32-bp", assignments=two)
    found, words = cut_by_cost(settings, blocks, TASK)
    assert found.model.cuts == ("b",)
    assert words == "cut as with model.cuts = 'auto': what a has alive cannot be counted without values"
