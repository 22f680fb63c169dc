"""The real networks and images of the benchmarks: the same for everybody, and the cut into parts of equal time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import build_blocks

CLASSES = 10
IMAGE = (3, 32, 32)
SGD: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
sgd: Callable[..., torch.optim.SGD] = partial(torch.optim.SGD, **SGD)
"""The optimiser of every baseline; ours takes the same numbers from its configuration."""


def network(model: str) -> nn.Sequential:
    """The backbone ``model`` with weights that are equal on all ranks."""
    torch.manual_seed(0)
    return nn.Sequential(*build_blocks(model, IMAGE[0], CLASSES).values())


def random_images(count: int, image: tuple[int, ...] = IMAGE) -> tuple[Tensor, Tensor]:
    """(count, *image) uint8 images and (count,) labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *image), generator=generator, dtype=torch.uint8)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def normalise(images: Tensor) -> Tensor:
    """uint8 -> float32 with mean about 0 and deviation about 1, channels last: what every system does in every step."""
    return images.float().div_(255.0).sub_(0.5).div_(0.25).contiguous(memory_format=torch.channels_last)


def block_seconds(blocks: nn.Sequential, x: Tensor, passes: int = 5) -> list[float]:
    """Median time of forward and backward of every block on ``x``, over ``passes`` passes after one to warm up."""
    times: list[list[float]] = [[] for _ in blocks]
    for _ in range(passes + 1):
        entrance = x
        for block, found in zip(blocks, times, strict=True):
            entrance = entrance.detach().requires_grad_()
            started = time.perf_counter()
            y = block(entrance)
            y.backward(torch.ones_like(y))
            if x.is_cuda:
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
            entrance = y
        blocks.zero_grad(set_to_none=True)
    return [statistics.median(found[1:]) for found in times]


def split(seconds: Sequence[float], parts: int, lighter: float = 1.0) -> tuple[int, ...]:
    """Blocks of each of ``parts`` consecutive parts, so that the slowest part is as fast as can be. The blocks of the
    last part count ``lighter`` times: below 1 it gets more of them."""
    total = [0.0, *itertools.accumulate(seconds)]

    @cache
    def best(blocks: int, parts: int, weight: float = 1.0) -> tuple[float, tuple[int, ...]]:
        if parts == 1:
            return total[blocks], (blocks,)
        options = []
        for before in range(parts - 1, blocks):
            slowest, counts = best(before, parts - 1)
            options.append((max(slowest, weight * (total[blocks] - total[before])), (*counts, blocks - before)))
        return min(options)

    return best(len(seconds), parts, lighter)[1]


def split_twice(seconds: Sequence[float], modules: int, ranks: int, lighter: float) -> tuple[tuple[int, ...], ...]:
    """Blocks of every local module, by rank: ranks of equal time, and in each its modules of equal time. Where they
    are no multiple of ``ranks``, the last ranks own one more. Empty if a rank has too few blocks."""
    found, start = [], 0
    for rank, blocks in enumerate(split(seconds, ranks, lighter)):
        own = modules // ranks + (rank >= ranks - modules % ranks)
        if own > blocks:
            return ()
        found.append(split(seconds[start : start + blocks], own))
        start += blocks
    return tuple(found)


def grouped(blocks: nn.Sequential, counts: Sequence[int]) -> list[list[nn.Module]]:
    """The blocks of every part."""
    items = iter(blocks)
    return [list(itertools.islice(items, count)) for count in counts]
