"""InfoPro and HPFF as their code for ImageNet and Cityscapes computes them: heads, decoders, losses and BatchNorm,
written out from the published layers with functions of PyTorch alone, in float64 (relative 1e-10)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_gradients import assert_same
from tiny import CLASSES, gradients, train_on, without_updates
from tiny_strided import (
    IMAGE,
    IMAGENET,
    SCENES,
    dense_blocks,
    dense_config,
    imagenet_blocks,
    imagenet_config,
    images,
    narrow_heads,
)
from torch import Tensor, nn

from pipeline.base.config import Config
from pipeline.base.numerics import Numerics
from pipeline.edges.connect import Edges
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Classification, Task
from pipeline.models.backbones import Blocks
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage

WIDTHS = {"infopro": 12, "hpff": 16, "released": 16}


def batch_of(dtype: torch.dtype, dense: bool = False) -> Batch:
    image, target = images(1, dense)
    return Batch(image.to(dtype) / 127.5 - 1.0, target, image)


def stage_of(config: Config, task: Task, blocks: Callable[[], Blocks]) -> tuple[Stage, list[LocalModule]]:
    plan = make_plan(config, blocks(), task, 1)
    modules = build_modules(plan, 0, blocks(), Numerics(torch.device("cpu"), torch.float64, False), fresh=True)
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
    """5 R + 0.75 T: HPFF's paper has the mean of patches, its code the sum of R of the quarters of what is decoded."""
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


@pytest.mark.parametrize("variant", IMAGENET)
@narrow_heads
def test_a_step_on_imagenet_is_the_published_one(variant: str) -> None:
    stage, modules = stage_of(imagenet_config(variant), Classification(CLASSES, IMAGE), imagenet_blocks)
    reference, batch = copy.deepcopy(modules), batch_of(torch.float64)
    if variant == "released":
        for block in [block for module in reference for block in module.blocks.values()]:
            for layer in block.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.momentum = 0.1
    train_on(without_updates(stage), 0, 0, batch)
    literal_step(reference, batch, variant)
    assert_same(gradients(modules), gradients(reference))
    assert (decoder_widths(modules) & {12, 16}) == {WIDTHS[variant], 16}  # 16 behind a map of a 16th
    if variant == "released":
        for mine, theirs in zip(modules, reference, strict=True):
            for name, block in mine.blocks.items():
                for key, value in theirs.blocks[name].state_dict().items():
                    torch.testing.assert_close(block.state_dict()[key], value, rtol=1e-12, atol=1e-12)


def decoder_widths(modules: list[LocalModule]) -> set[int]:
    """Channels of all convolutions of the decoders."""
    levels = [level for module in modules for level in module.levels.values()]
    layers = [layer for level in levels for layer in level.terms["reconstruction"].modules()]
    return {layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)}


# --- Cityscapes -------------------------------------------------------------------------------------------------------


def test_a_step_on_cityscapes_is_the_published_one() -> None:
    """1.5 R + T for each local module; the last one's loss, and 0.4 of that of the second head. Pixels of 255 do not
    count. Without dropout, whose masks nobody could compare."""
    stage, modules = stage_of(dense_config(), SCENES, dense_blocks)
    parts = [part for module in modules for part in (*module.blocks.values(), *module.levels.values())]
    for layer in [layer for part in parts for layer in part.modules()]:
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0
    reference, batch = copy.deepcopy(modules), batch_of(torch.float64, dense=True)
    train_on(without_updates(stage), 0, 0, batch)

    image, flow = batch.image.double() / 255, batch.x
    for module in reference[:-1]:
        flow = {name: x.detach() for name, x in flow.items()} if isinstance(flow, dict) else flow.detach()
        for block in module.blocks.values():
            flow = block.train()(flow)
        h = flow["x"] if isinstance(flow, dict) else flow
        decoder, head = (
            dict(module.levels["independent"].terms[term].heads[0].named_parameters())
            for term in ("reconstruction", "task")
        )
        dense_scores = F.conv2d(h, head["head.0.weight"], head["head.0.bias"], padding=1)
        dense_scores = normalised(dense_scores, head, "head.1")
        dense_scores = F.conv2d(dense_scores, head["head.4.weight"], head["head.4.bias"])
        dense_scores = F.interpolate(dense_scores, IMAGE[1:], mode="bilinear", align_corners=True)
        (1.5 * entropy(pixels(h, image, decoder), image) + per_pixel(dense_scores, batch.labels)).backward()
    classifier = reference[-1].blocks["classifier"]
    scores = [
        F.interpolate(head(flow[name].detach()), IMAGE[1:], mode="bilinear", align_corners=False)
        for head, name in ((classifier.get_submodule("head"), "x"), (classifier.get_submodule("aux"), "stage3"))
    ]
    (per_pixel(scores[0], batch.labels) + 0.4 * per_pixel(scores[1], batch.labels)).backward()
    assert_same(gradients(modules), gradients(reference))
    assert set(modules[-1].losses.open[0]) == {"final", "final.aux"}


def per_pixel(scores: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, mean over the pixels that count."""
    counts = target != 255
    chosen = scores.gather(1, target.where(counts, 0)[:, None])[:, 0]
    return (scores.logsumexp(dim=1) - chosen)[counts].mean()
