"""The real peak of memory, asked from PyTorch's CPU allocator: of heads on patches one after another and at once, under
``auto``, and of whole steps as they were planned."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import pytest
import torch
from helpers_memory import allocator_peak
from tiny import tiny_batch, tiny_config, train_on
from torch import Tensor, nn

from pipeline.base.flow import TensorSpec
from pipeline.base.numerics import Numerics
from pipeline.edges.connect import Edges
from pipeline.local.at_once import ROWS, HeadMemory, bytes_of_modules
from pipeline.local.methods import Level
from pipeline.local.task import Classification
from pipeline.models.backbones import BasicBlock
from pipeline.models.heads import AuxiliaryHead, DecoderHead, Given, TaskHead, dgl_head
from pipeline.models.patches import PatchedHead, patch_shape
from pipeline.plan.assembly import Plan, build_modules, make_plan
from pipeline.plan.profiling import profile_modules
from pipeline.plan.rank_memory import rank_memory
from pipeline.stage.inlet import BatchInlet
from pipeline.stage.stage import Stage

SHAPE = (16, 32, 32)
SIDE = 32
TASK = Classification(4, (3, SIDE, SIDE))
CPU = torch.device("cpu")


# --- heads ------------------------------------------------------------------------------------------------------------


def decoder(shape: tuple[int, ...]) -> AuxiliaryHead:
    return DecoderHead(shape[0], 3, 1)


def classifier(shape: tuple[int, ...]) -> AuxiliaryHead:
    return TaskHead(dgl_head(shape, 4, "cnn"))


def peak_of(make: Any, grid: int, at_once: int, feature: Tensor) -> int:
    """Of one step of a head's work, gradients of its weights included."""
    head = PatchedHead(partial(make, patch_shape(tuple(feature.shape[1:]), grid)), grid, at_once=at_once)
    return head_peak(head, feature)


def head_peak(head: PatchedHead, feature: Tensor) -> int:
    given = Given(torch.zeros(len(feature), dtype=torch.int64), _image(feature))
    head.backward(feature, given, 1.0)  # what it makes once and keeps
    head.zero_grad()
    return allocator_peak(lambda: head.backward(feature, given, 1.0))


def _image(feature: Tensor) -> Tensor:
    return torch.zeros(len(feature), 3, *feature.shape[2:], dtype=torch.uint8)


@pytest.mark.parametrize("grid", [2, 4])
@pytest.mark.parametrize("make", [decoder, classifier])
def test_one_patch_after_another_needs_one_patch_and_at_once_all_of_them(make: Any, grid: int) -> None:
    """One after another: the gradient of the feature, a copy of a patch, and what the head needs where that patch is
    all there is. At once: as much again for every other patch, a copy of it or not."""
    feature = torch.randn(16, *SHAPE)
    patch = feature[..., : SIDE // grid, : SIDE // grid].clone()
    one = peak_of(make, 1, 1, patch)
    sequential, together = (peak_of(make, grid, number, feature) for number in (1, grid**2))
    assert sequential == pytest.approx(feature.nbytes + patch.nbytes + one, rel=0.03)
    others = grid**2 - 1
    assert 0.9 * others * one < together - sequential < 1.1 * others * (one + patch.nbytes)


@pytest.mark.parametrize(("make", "width"), [(decoder, 20), (decoder, 28), (classifier, 48)])
def test_auto_stays_below_what_the_largest_backward_needs_beside_the_graph(make: Any, width: int) -> None:
    """Beside the gradients of the feature and of weights, which every form needs, and a tenth that kernels need for
    themselves; all patches at once would not."""
    rows, grid = 16, 4
    block = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    modules = bytes_of_modules([([block], {"x": TensorSpec((3, SIDE, SIDE))})])
    available = modules[0].backward - modules[0].graph
    head = PatchedHead(partial(make, patch_shape(SHAPE, grid)), grid, at_once=grid**2)
    feature = torch.randn(rows, *SHAPE)
    stays = feature.nbytes + sum(parameter.nbytes for parameter in head.parameters())
    all_of_them = head_peak(head, feature) - stays
    HeadMemory(modules, TASK).fit(0, [Level(1.0, {"term": (1.0, head)})], SHAPE)
    assert 1 < head.at_once < grid**2
    promised = available * rows / ROWS
    assert head_peak(head, feature) - stays < 1.1 * promised < 1.1 * all_of_them


# --- whole steps ------------------------------------------------------------------------------------------------------


def blocks() -> OrderedDict[str, nn.Module]:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    classes = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    parts = [("stem", stem), ("a", BasicBlock(8, 8, 1)), ("b", BasicBlock(8, 16, 2)), ("c", BasicBlock(16, 16, 1))]
    return OrderedDict([*parts, ("classifier", classes)])


def step_plan(method: str, ranks: int = 1, **sections: dict[str, Any]) -> Plan:
    config = tiny_config(method, span=2, modules=3, data={"batch_size": 16}, **sections)
    return make_plan(config, blocks(), TASK, ranks)


def step_peak(plan: Plan, numerics: Numerics) -> tuple[int, int]:
    """Of a step of all modules on one rank: the peak with all that stays, and the state alone."""
    modules = build_modules(plan, 0, blocks(), numerics, fresh=True)
    stage = Stage(modules, plan.schedules[0], BatchInlet(), Edges())
    batch = tiny_batch(rows=16, image_shape=(3, SIDE, SIDE))
    train_on(stage, 0, 0, batch)
    peak = allocator_peak(lambda: train_on(stage, 0, 1, batch))  # with the gradients, which were freed after step 0
    parts = [part for module in modules for part in (*module.blocks.values(), *module.levels.values())]
    stays = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    stays += [value for module in modules for _, value in module.optimiser.state()]
    return peak, sum(tensor.nbytes for tensor in stays)


@pytest.mark.parametrize("grid", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_peaks_as_planned_in_either_form(grid: int, dtype: torch.dtype) -> None:
    numerics = Numerics(CPU, dtype, channels_last=True)
    found = {}
    for at_once in (1, grid**2):
        plan = step_plan("infopro", patches={"grid": grid, "at_once": at_once})
        profile = profile_modules(plan, blocks(), numerics, warmup=0, steps=1)
        (planned,) = rank_memory(plan, profile.modules, numerics)
        peak, state = step_peak(plan, numerics)
        assert planned == pytest.approx(peak + state, rel=0.12)
        found[at_once] = peak
    assert found[1] < 0.85 * found[grid**2]
