"""The other ways to train the same network: plain PyTorch on one device, DDP, and torch.distributed.pipelining.

    one device     forward, backward, step; also with activation checkpointing
    DDP            every rank a copy, a share of the batch
    pipelines      GPipe with M = 1 is naive model parallelism; 1F1B, interleaved, zero-bubble
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bursts import System
from networks import sgd
from ranks import Rank
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

Step = Callable[[Tensor, Tensor], float | None]
"""(inputs, labels) of a whole batch -> its loss, None where this rank does not see it."""


@dataclass(frozen=True)
class TorchSchedule:
    """A schedule of torch.distributed.pipelining."""

    make: Callable[..., Any]
    parts_per_rank: int = 1  # of the network
    vee: bool = False  # parts are placed 0 1 2 2 1 0 and not 0 1 2 0 1 2

    def owner(self, part: int, ranks: int) -> int:
        """The rank of a part."""
        row, place = divmod(part, ranks)
        return ranks - 1 - place if self.vee and row % 2 else place

    def loads(self, seconds: Sequence[float]) -> list[float]:
        """Work of every rank, from that of one module per rank: each is cut into as many parts as a rank owns."""
        ranks, each = len(seconds), self.parts_per_rank
        loads = [0.0] * ranks
        for part in range(ranks * each):
            loads[self.owner(part, ranks)] += seconds[part // each] / each
        return loads

    def fits(self, micro_batches: int, ranks: int) -> bool:
        """Whether torch accepts this number of micro-batches."""
        if self.make is pipelining.Schedule1F1B:
            return micro_batches >= ranks
        rounds = max(1, micro_batches // ranks)
        return self.parts_per_rank == 1 or self.vee or micro_batches % rounds == 0


TORCH_SCHEDULES = {
    "GPipe": TorchSchedule(pipelining.ScheduleGPipe),
    "1F1B": TorchSchedule(pipelining.Schedule1F1B),
    "Interleaved1F1B": TorchSchedule(pipelining.ScheduleInterleaved1F1B, 2),
    "InterleavedZeroBubble": TorchSchedule(pipelining.ScheduleInterleavedZeroBubble, 2),
    "ZBVZeroBubble": TorchSchedule(pipelining.ScheduleZBVZeroBubble, 2, vee=True),
}


def torch_systems(names: Sequence[str], ranks: int, counts: Sequence[int], burst: Any) -> list[System]:
    """For every named schedule those numbers of micro-batches that it accepts."""
    return [
        System(f"torch {name}", "bp", name, ranks, ranks * TORCH_SCHEDULES[name].parts_per_rank, count, burst=burst)
        for name in names
        for count in counts
        if TORCH_SCHEDULES[name].fits(count, ranks)
    ]


def wire(x: Tensor) -> Tensor:
    """A map (b, c, h, w), channels last, as a contiguous (b, h, w, c): torch sends only contiguous tensors. A view."""
    return x.permute(0, 2, 3, 1).contiguous() if x.dim() == 4 else x


class _Entrance(torch.autograd.Function):
    """What ``wire`` has sent, as a map again; the gradient leaves contiguous, whatever the schedule asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if x.dim() == 4 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return wire(gradient).contiguous()


class _Exit(torch.autograd.Function):
    """``wire`` as a tensor of its own on the same memory: zero-bubble schedules detach it in place, no view can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        sent = wire(x)
        return sent.new_empty(0).set_(sent.untyped_storage(), sent.storage_offset(), sent.size(), sent.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.permute(0, 3, 1, 2) if gradient.dim() == 4 else gradient


class Part(nn.Module):
    """Consecutive blocks between two boundaries. The blocks run channels last, and so the boundaries cost no copy."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Exit.apply(self.blocks(_Entrance.apply(x)))
        return y


@contextmanager
def torch_pipeline(
    rank: Rank, system: System, parts: Sequence[Sequence[nn.Module]], inputs: Tensor
) -> Iterator[tuple[Step, float]]:
    """A pipeline over all ranks, of the blocks of every part, with equal weights on all ranks; ``inputs`` are a whole
    batch, for the shapes. Yields the step, which uses the inputs on rank 0 and the labels on the rank of the last part,
    and the bytes that this rank sends in one."""
    schedule, micro_batches = TORCH_SCHEDULES[system.schedule], system.micro_batches
    with rank.group(inputs.device):
        modules = [Part(blocks).to(inputs.device) for blocks in parts]
        if inputs.dim() == 4:
            modules = [module.to(memory_format=torch.channels_last) for module in modules]
        shapes = _boundaries(modules, wire(inputs[: len(inputs) // micro_batches]))
        mine = [part for part in range(len(parts)) if schedule.owner(part, rank.count) == rank.index]
        stages = []
        for part in mine:
            ends = shapes[part].requires_grad_(part > 0), shapes[part + 1].clone().requires_grad_()
            place = (modules[part], part, len(parts), inputs.device)
            stages.append(pipelining.PipelineStage(*place, input_args=ends[0], output_args=ends[1]))
        single = schedule.parts_per_rank == 1
        pipeline = schedule.make(stages[0] if single else stages, micro_batches, loss_fn=cross_entropy)
        trained = sgd([parameter for part in mine for parameter in modules[part].parameters()])
        first, last = 0 in mine, len(parts) - 1 in mine

        def step(batch: Tensor, labels: Tensor) -> float | None:
            losses: list[Tensor] | None = [] if last else None
            arguments = (wire(batch),) if first else ()
            pipeline.step(*arguments, target=labels if last else None, losses=losses)
            trained.step()
            trained.zero_grad()
            return float(torch.stack(losses).mean()) if losses else None

        sent = 0
        for part in mine:
            for neighbour, boundary in ((part - 1, shapes[part]), (part + 1, shapes[part + 1])):
                if 0 <= neighbour < len(parts) and neighbour not in mine:
                    sent += boundary.nbytes * micro_batches
        yield step, sent


def _boundaries(modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """A micro-batch before every part and behind the last one."""
    tensors = [x.clone()]
    with torch.no_grad():
        for module in modules:
            tensors.append(module.eval()(tensors[-1]).clone())
            module.train()
    return tensors


def one_device(network: nn.Sequential, micro_batches: int = 1, checkpointing: bool = False) -> Step:
    """Backpropagation in one process; gradients of micro-batches are accumulated. ``checkpointing`` keeps only the
    inputs of blocks, and runs their forward passes again in the backward pass."""
    trained = sgd(list(network.parameters()))

    def forward(x: Tensor) -> Tensor:
        for block in network:
            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        return x

    def step(batch: Tensor, labels: Tensor) -> float:
        total = 0.0
        for x, y in zip(batch.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
            loss = cross_entropy(forward(x), y) / micro_batches
            loss.backward()
            total += float(loss.detach())
        trained.step()
        trained.zero_grad()
        return total

    return step


@contextmanager
def data_parallel(rank: Rank, network: nn.Sequential) -> Iterator[tuple[Step, float]]:
    """DistributedDataParallel. Yields the step, on this rank's rows of the batch, and the bytes that this rank sends in
    one: a ring all-reduce."""
    parameters = list(network.parameters())
    with rank.group(parameters[0].device):
        copy = DistributedDataParallel(network)
        trained = sgd(parameters)

        def step(batch: Tensor, labels: Tensor) -> float:
            loss = cross_entropy(copy(batch), labels)
            loss.backward()
            trained.step()
            trained.zero_grad()
            return float(loss.detach())

        gradients = sum(parameter.nbytes for parameter in parameters)
        yield step, 2 * (rank.count - 1) / rank.count * gradients
