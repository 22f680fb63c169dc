"""Narrow networks of the strides of those for ImageNet and Cityscapes, for small images: what the heads of InfoPro and
HPFF for them are tried on."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from own_tasks import Segmentation
from tiny import CLASSES, tiny_config
from torch import Tensor, nn

from pipeline import LoaderData, train
from pipeline.base.config import Config
from pipeline.models import imagenet_heads
from pipeline.models.backbones import BasicBlock
from pipeline.models.deeplab import STAGE3, DeepLabClassifier, FlowBottleneck

IMAGE = (3, 32, 32)
ROWS, BATCHES = 6, 2
IGNORED = 255
IMAGENET: dict[str, dict[str, dict[str, Any]]] = {
    "infopro": {},
    "hpff": {
        "patches": {"grid": 2, "at_once": 4},
        "hierarchy": {"cascade_span": 2},
        "method": {"decoder": "imagenet-hpff"},
    },
    "released": {
        "hierarchy": {"variant": "released", "cascade_span": 2, "independent_weight": 0.0, "cascade_weight": 1.0},
        "method": {"decoder": "imagenet-hpff", "reconstruction": (20.0, 20.0)},
    },
}
"""Settings of the recipes."""


def imagenet_blocks() -> OrderedDict[str, nn.Module]:
    """Modules that end in maps of a 4th, an 8th and a 16th of the sides of the image."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    residual = [("a", BasicBlock(4, 5, 1)), ("b", BasicBlock(5, 5, 2)), ("c", BasicBlock(5, 6, 2))]
    classifier = nn.Sequential(BasicBlock(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return OrderedDict([("stem", stem), *residual, ("classifier", classifier)])


def dense_blocks() -> OrderedDict[str, nn.Module]:
    """As DeepLabV3 from stage 3 on, output stride 8; its second head stands on what block "d" gets."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    blocks = [(name, FlowBottleneck(8, 2, dilation=2)) for name in "bcd"]
    blocks[-1][1].keeps = STAGE3
    classifier = DeepLabClassifier(nn.Conv2d(8, CLASSES, 1), nn.Sequential(nn.Dropout(0.1), nn.Conv2d(8, CLASSES, 1)))
    return OrderedDict([("stem", stem), *blocks, ("classifier", classifier)])


def imagenet_config(variant: str) -> Config:
    """Four local modules, one head of each kind and size."""
    sections = dict(IMAGENET[variant])
    method = {"head": "imagenet", "decoder": "imagenet", "reconstruction": (5.0, 5.0), "task": (0.75, 0.75)}
    method |= sections.pop("method", {})
    span = sections.get("hierarchy", {}).get("cascade_span", 1)
    return _with_method(tiny_config("infopro", "plain", span, 4, **_common("c", "classifier"), **sections), method)


def dense_config() -> Config:
    """Four local modules; run A of InfoPro, without its batch."""
    method = {"head": "fcn", "decoder": "imagenet", "reconstruction": (1.5, 1.5), "task": (1.0, 1.0)}
    return _with_method(tiny_config("infopro", "plain", 1, 4, **_common("d", "classifier")), method)


def _common(*cuts: str) -> dict[str, dict[str, Any]]:
    return {"model": {"cuts": ["b", *cuts]}, "train": {"epochs": 1}, "checkpoint": {"every_epochs": 0}}


def _with_method(config: Config, method: dict[str, Any]) -> Config:
    return dataclasses.replace(config, method=dataclasses.replace(config.method, **method))


narrow_heads = mock.patch.object(imagenet_heads, "HEAD_WIDTHS", (6, 7, 9))
"""Inside, in place of widths up to 2048."""


class Scenes(Segmentation):
    """Pixels of class 255 do not count."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, ignore_index=IGNORED)


SCENES = Scenes(CLASSES, IMAGE)


def images(step: int, dense: bool = False) -> tuple[Tensor, Tensor]:
    """A batch: uint8 images, and classes of them, or of their pixels with some to be ignored."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (ROWS, *IMAGE), generator=generator, dtype=torch.uint8)
    target = torch.randint(CLASSES, (ROWS, *IMAGE[1:]) if dense else (ROWS,), generator=generator)
    if dense:
        target[torch.rand(target.shape, generator=generator) < 0.1] = IGNORED
    return image, target


CASES = (*IMAGENET, "cityscapes")


@narrow_heads
def trained_on_strided(rank: int, folder: str) -> dict[str, str]:
    """The digest of the weights of every case."""
    found = {}
    for case in CASES:
        dense = case == "cityscapes"
        batches = [images(step, dense) for step in range(BATCHES)]
        test = [(image, target % CLASSES) for image, target in batches[:1]]  # every pixel counts
        run: dict[str, Any] = {"task": SCENES if dense else None, "data": LoaderData(batches, test)}
        run["network"] = nn.Sequential(dense_blocks() if dense else imagenet_blocks())
        generator = torch.Generator().manual_seed(2)
        for parameter in run["network"].parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        config = dense_config() if dense else imagenet_config(case)
        found[case] = train(config, run_dir=Path(folder) / case, quiet=True, **run)["weights_sha256"]
    return found
