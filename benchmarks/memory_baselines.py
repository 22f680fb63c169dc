"""Peaks of the other ways to train a network, on tensors without values and without memory.

    one device     plain PyTorch under torch's own MemTracker; with activation checkpointing
    pipelines      the schedules of torch.distributed.pipelining, run rank by rank in a group whose messages go nowhere:
                   what they hold is what they would hold, receive buffers included
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
import torch.distributed as dist
from baselines import TORCH_SCHEDULES
from networks import sgd
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import pipelining
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.functional import cross_entropy
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint_sequential

from pipeline import Alive, build_blocks

STEPS = 2  # the first one makes the momentum
Run = Callable[[nn.Sequential, Tensor, Tensor], None]


def plain(network: nn.Sequential, x: Tensor, labels: Tensor) -> None:
    """Forward and backward."""
    cross_entropy(network(x), labels).backward()


def checkpointed(network: nn.Sequential, x: Tensor, labels: Tensor) -> None:
    """The same with as many segments as is usual: the square root of the number of blocks."""
    parts = max(2, round(len(network) ** 0.5))
    cross_entropy(checkpoint_sequential(network, parts, x, use_reentrant=False), labels).backward()


def tracked(run: Run, model: str, images: tuple[int, ...], classes: int) -> int:
    """Peak bytes of a step on ``images`` (B, C, H, W), by torch's tracker."""
    with FakeTensorMode():
        network = nn.Sequential(*_blocks(model, images, classes))  # some are traced then, which the tracker minds
        with MemTracker() as tracker:
            tracker.track_external(network)
            _train(run, network, images, tracker.reset_mod_stats)
            peak = tracker.get_tracker_snapshot("peak")
    return int(peak[torch.device("cpu")]["Total"])


def counted(run: Run, model: str, images: tuple[int, ...], classes: int) -> int:
    """The same by ours, which minds no module that runs twice."""
    with FakeTensorMode(), Alive(as_alone=True) as alive:
        _train(run, nn.Sequential(*_blocks(model, images, classes)), images, lambda: None)
    return int(alive.most)


def _train(run: Run, network: nn.Sequential, images: tuple[int, ...], between: Callable[[], None]) -> None:
    x = torch.empty(images).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(images[0], dtype=torch.int64)
    optimiser = sgd(network.parameters())
    for _ in range(STEPS):
        run(network, x, labels)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        between()


def pipelined(schedule: str, micro_batches: int, ranks: int, model: str, images: tuple[int, ...], classes: int) -> int:
    """Peak bytes of the rank that needs most, of parts with as many blocks each."""
    return max(_rank(schedule, micro_batches, rank, ranks, model, images, classes) for rank in range(ranks))


def _rank(
    schedule: str, micro_batches: int, rank: int, ranks: int, model: str, images: tuple[int, ...], classes: int
) -> int:
    kind = TORCH_SCHEDULES[schedule]
    count = ranks * kind.parts_per_rank
    mine = [part for part in range(count) if kind.owner(part, ranks) == rank]
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Alive(as_alone=True) as alive:
            parts = _parts(_blocks(model, images, classes), count)
            x, labels = torch.empty(images), torch.zeros(images[0], dtype=torch.int64)
            shapes = _shapes(parts, x[: images[0] // micro_batches])
            stages = []
            for part in mine:
                entrance, end = (torch.empty(shape, requires_grad=True) for shape in shapes[part : part + 2])
                entrance.requires_grad_(part > 0)
                place = (parts[part], part, count, x.device)
                stages.append(pipelining.PipelineStage(*place, input_args=entrance, output_args=end))
            optimiser = sgd([parameter for part in mine for parameter in parts[part].parameters()])
            parts.clear()  # those of other ranks
            single = kind.parts_per_rank == 1
            pipeline = kind.make(stages[0] if single else stages, micro_batches, loss_fn=cross_entropy)
            inputs, last = (x,) if 0 in mine else (), count - 1 in mine
            if not inputs:
                del x
            for _ in range(STEPS):
                alive.most = alive.now
                pipeline.step(*inputs, target=labels if last else None, losses=[] if last else None)
                optimiser.step()
                optimiser.zero_grad()
            return int(alive.most)
    finally:
        dist.destroy_process_group()


def _blocks(model: str, images: tuple[int, ...], classes: int) -> list[nn.Module]:
    """What truncates a normal distribution asks for values: it is not drawn here."""
    with patch("torch.nn.init.trunc_normal_", side_effect=lambda tensor, *_, **__: tensor):
        return list(build_blocks(model, images[1], classes, images[2:]).values())


def _parts(blocks: Sequence[nn.Module], count: int) -> list[nn.Sequential]:
    edges = [round(part * len(blocks) / count) for part in range(count + 1)]
    return [nn.Sequential(*blocks[first:end]) for first, end in itertools.pairwise(edges)]


@torch.no_grad()
def _shapes(parts: Sequence[nn.Module], x: Tensor) -> list[tuple[int, ...]]:
    shapes = [tuple(x.shape)]
    for part in parts:
        x = part(x)
        shapes.append(tuple(x.shape))
    return shapes
