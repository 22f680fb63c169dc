"""InfoPro and HPFF as their ImageNet code computes them: heads, decoders, losses and BatchNorm, written out from the
published layers with functions of PyTorch alone, in float64 (relative 1e-10); and on 1 to 4 ranks, bit for bit."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_gradients import assert_same
from tiny import gradients, tiny_config, train_on, without_updates
from torch import Tensor, nn

from pipeline.base.config import Config
from pipeline.base.numerics import Numerics
from pipeline.edges.connect import Edges
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Classification
from pipeline.models.backbones import BasicBlock
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage

CLASSES, IMAGE = 4, (3, 32, 32)
SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "infopro": {},
    "hpff": {"patches": {"grid": 2}, "hierarchy": {"cascade_span": 2}, "method": {"decoder": "imagenet-hpff"}},
    "released": {
        "hierarchy": {"variant": "released", "cascade_span": 2, "independent_weight": 0.0, "cascade_weight": 1.0},
        "method": {"decoder": "imagenet-hpff", "reconstruction": (20.0, 20.0)},
    },
}
"""Settings of the recipes."""
WIDTHS = {"infopro": 12, "hpff": 16, "released": 16}


def blocks() -> OrderedDict[str, nn.Module]:
    """Modules that end in maps of a 4th, an 8th and a 16th of the sides of the image; narrow."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    residual = [("a", BasicBlock(4, 5, 1)), ("b", BasicBlock(5, 5, 2)), ("c", BasicBlock(5, 6, 2))]
    classifier = nn.Sequential(BasicBlock(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return OrderedDict([("stem", stem), *residual, ("classifier", classifier)])


def config_of(variant: str) -> Config:
    sections = dict(SECTIONS[variant])
    method = {"head": "imagenet", "decoder": "imagenet", "reconstruction": (5.0, 5.0), "task": (0.75, 0.75)}
    method |= sections.pop("method", {})
    span = sections.get("hierarchy", {}).get("cascade_span", 1)
    model = {"cuts": ["b", "c", "classifier"]}
    config = tiny_config("infopro", "plain", span, 4, model=model, **sections)
    return replace(config, method=replace(config.method, **method))


def batch_of(dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (6, *IMAGE), generator=generator, dtype=torch.uint8)
    return Batch(image.to(dtype) / 127.5 - 1.0, torch.tensor([0, 1, 2, 3, 1, 2]), image)


def stage_of(config: Config, dtype: torch.dtype) -> tuple[Stage, list[LocalModule]]:
    plan = make_plan(config, blocks(), Classification(CLASSES, IMAGE), 1)
    modules = build_modules(plan, 0, blocks(), Numerics(torch.device("cpu"), dtype, False), fresh=True)
    return Stage(modules, plan.schedules[0], BatchInlet(), Edges()), modules


# --- the literal computation ------------------------------------------------------------------------------------------


def normalised(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """BatchNorm over the batch, then ReLU."""
    mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), unbiased=False, keepdim=True)
    scale, offset = (weights[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
    return ((x - mean) / torch.sqrt(variance + 1e-5) * scale + offset).relu()


def class_scores(h: Tensor, weights: dict[str, Tensor]) -> Tensor:
    for index, (stride, padding) in enumerate([(1, 0), (2, 1), (2, 1), (1, 0)]):
        h = F.conv2d(h, weights[f"head.{3 * index}.weight"], None, stride, padding)
        h = normalised(h, weights, f"head.{3 * index + 1}")
    return h.mean(dim=(2, 3)) @ weights["head.14.weight"].T + weights["head.14.bias"]


def pixels(h: Tensor, image: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """What the decoder gives: sizes of [2.3] and [3.3], for 224 pixels, in proportion."""
    side = image.shape[-1]
    sizes = {8: [side // 4, side // 2, side], 16: [side // 2, side // 4, side // 2, side], 4: [side // 2, side]}
    h = normalised(F.conv2d(h, weights["decoder.0.weight"], weights["decoder.0.bias"]), weights, "decoder.1")
    steps = sizes[side // h.shape[-1]]
    for index, size in enumerate(steps, start=1):
        h = F.interpolate(h, (size, size), mode="bilinear", align_corners=True)
        h = F.conv2d(h, weights[f"decoder.{3 * index}.weight"], weights[f"decoder.{3 * index}.bias"], padding=1)
        h = torch.sigmoid(h) if index == len(steps) else normalised(h, weights, f"decoder.{3 * index + 1}")
    return h


def entropy(p: Tensor, u: Tensor) -> Tensor:
    return -(u * p.log() + (1 - u) * (1 - p).log()).mean()


def quarters(x: Tensor) -> list[Tensor]:
    half = x.shape[-1] // 2
    return [x[..., i : i + half, j : j + half] for i in (0, half) for j in (0, half)]


def local_loss(module: LocalModule, level: str, h: Tensor, batch: Batch, variant: str) -> Tensor:
    """5 R + 0.75 T; in HPFF's paper the mean over patches, in its code the sum of R over those of the decoder's output."""
    decoder, head = (
        dict(module.levels[level].terms[term].heads[0].named_parameters()) for term in ("reconstruction", "task")
    )
    image = batch.image.to(h.dtype) / 255
    if variant == "released":
        p = pixels(h, image, decoder)
        reconstruction = sum(entropy(a, u) for a, u in zip(quarters(p), quarters(image), strict=True))
        return 5 * reconstruction + 0.75 * F.cross_entropy(class_scores(h, head), batch.labels)
    patches = [(h, image)] if variant == "infopro" else list(zip(quarters(h), quarters(image), strict=True))
    each = [
        5 * entropy(pixels(x, u, decoder), u) + 0.75 * F.cross_entropy(class_scores(x, head), batch.labels)
        for x, u in patches
    ]
    return torch.stack(each).mean()


def literal_step(modules: list[LocalModule], batch: Batch, variant: str) -> None:
    """Every path of every loss anew, in the order of the published code; BatchNorm moves whenever a module runs."""

    def run(index: int, h: Tensor) -> Tensor:
        for block in modules[index].blocks.values():
            h = block.train()(h)
        return h

    last = len(modules) - 1
    if variant == "infopro":
        h = batch.x
        for index in range(last):
            h = run(index, h.detach())
            local_loss(modules[index], "independent", h, batch, variant).backward()
        F.cross_entropy(run(last, h.detach()), batch.labels).backward()
        return
    if variant == "hpff":
        before = [batch.x]
        for index in range(last):
            before.append(run(index, before[-1]).detach())
        for index in range(last):
            h = run(index, before[index])
            local_loss(modules[index], "independent", h, batch, variant).backward()
            if index > 0:
                z = run(index, run(index - 1, before[index - 1]))
                local_loss(modules[index], "cascade", z, batch, variant).backward()
        F.cross_entropy(run(last, before[last]), batch.labels).backward()
        return
    stem, rest = list(modules[0].blocks.values())[0].train(), list(modules[0].blocks.values())[1:]
    first = stem(batch.x)

    def run_first(h: Tensor) -> Tensor:
        for block in rest:
            h = block.train()(h)
        return h

    run_first(first.detach())  # its result is never used
    y = first
    for index in range(1, last):
        y = run_first(y) if index == 1 else run(index - 1, y)
        local_loss(modules[index], "cascade", run(index, y), batch, variant).backward()
        y = y.detach()
    F.cross_entropy(run(last, run(last - 1, y)), batch.labels).backward()


@pytest.mark.parametrize("variant", SECTIONS)
def test_a_step_is_the_published_one(variant: str) -> None:
    stage, modules = stage_of(config_of(variant), torch.float64)
    reference, batch = copy.deepcopy(modules), batch_of(torch.float64)
    if variant == "released":
        for block in [block for module in reference for block in module.blocks.values()]:
            for layer in block.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.momentum = 0.1
    train_on(without_updates(stage), 0, 0, batch)
    literal_step(reference, batch, variant)
    assert_same(gradients(modules), gradients(reference))
    widths = {
        m.out_channels for module in modules for level in module.levels.values() for m in level.modules()
        if isinstance(m, nn.Conv2d)
    }
    assert (WIDTHS[variant] in widths) and (28 - WIDTHS[variant] not in widths or variant == "infopro")
    if variant == "released":
        for mine, theirs in zip(modules, reference, strict=True):
            for name, block in mine.blocks.items():
                for key, value in theirs.blocks[name].state_dict().items():
                    torch.testing.assert_close(block.state_dict()[key], value, rtol=1e-12, atol=1e-12)
