"""``patches.at_once = "auto"``: as many patches as there is room for beside the graph of their module, up to what the
largest local module's own backward needs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import tiny_blocks, tiny_config, tiny_plan
from torch import Tensor, nn

from pipeline.base.flow import TensorSpec
from pipeline.base.numerics import Numerics
from pipeline.local.at_once import HeadMemory, ModuleBytes, bytes_of_modules
from pipeline.local.methods import Level
from pipeline.local.task import Classification
from pipeline.models.heads import DecoderHead, Given
from pipeline.models.patches import PatchedHead
from pipeline.models.unbuilt import no_values
from pipeline.plan.assembly import build_modules
from pipeline.plan.blank import blank_modules

SHAPE = (8, 16, 16)
TASK = Classification(4, (3, 16, 16))
CPU = torch.device("cpu")


class Graph:
    """Bytes that autograd holds, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> Kept:
        return Kept(self, tensor)


class Kept:
    """A saved tensor while it is saved."""

    def __init__(self, graph: Graph, tensor: Tensor) -> None:
        self.graph, self.tensor = graph, tensor
        graph.now += tensor.nbytes
        graph.most = max(graph.most, graph.now)

    def __del__(self) -> None:
        self.graph.now -= self.tensor.nbytes


def peak(at_once: int) -> int:
    """Most bytes of graphs while a decoder works on 2 x 2 patches."""
    patched = PatchedHead(partial(DecoderHead, 8, 3, 1), 2, at_once=at_once)
    graph = Graph()
    given = Given(torch.zeros(16, dtype=torch.int64), torch.zeros(16, 3, 16, 16, dtype=torch.uint8))
    with torch.autograd.graph.saved_tensors_hooks(graph.keep, lambda kept: kept.tensor):
        patched.backward(torch.randn(16, *SHAPE), given, 1.0)
    assert graph.now == 0
    return graph.most


def test_one_patch_after_another_holds_one_graph_and_all_at_once_hold_all() -> None:
    one, two, four = peak(1), peak(2), peak(4)
    assert one < 0.4 * four and one < 0.7 * two < 0.7 * 0.7 * four


def needs(width: int) -> ModuleBytes:
    """Of a convolution, BatchNorm and ReLU of ``width`` channels."""
    block = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    (found,) = bytes_of_modules([([block], {"x": TensorSpec((3, 16, 16))})])
    return found


def chosen(*widths: int) -> int:
    """Patches at once of a decoder on the first of modules of these widths."""
    level = Level(1.0, {"reconstruction": (1.0, PatchedHead(partial(DecoderHead, 8, 3, 1), 2, at_once=4))})
    HeadMemory([needs(width) for width in widths], TASK).fit(0, [level], SHAPE)
    ((_, head),) = level.heads()
    return head.at_once


def test_a_module_needs_what_its_graph_keeps_and_in_its_backward_more() -> None:
    """A graph of two maps of fp32, what the convolution and BatchNorm give; at most two gradients of maps besides."""
    one_map = 64 * 16 * 16 * 16 * 4
    found = needs(16)
    assert 2 * one_map <= found.graph < 3.2 * one_map and found.graph < found.backward <= found.graph + 2 * one_map


def test_auto_takes_what_fits_beside_the_graph_into_what_the_largest_backward_needs() -> None:
    found = [chosen(width) for width in (1, 24, 32, 40, 48, 200)]
    assert found == sorted(found)
    assert found[0] == 1 and found[-1] == 4 and len(set(found)) > 2
    assert chosen(24, 200) == 4 and chosen(200, 24) == 4 and chosen(24, 12) == chosen(24) < 4


def test_two_levels_at_work_together_share_what_there_is() -> None:
    def fitted(module: ModuleBytes, together: bool) -> list[int]:
        heads = [PatchedHead(partial(DecoderHead, 8, 3, 1), 2) for _ in range(2)]
        levels = [Level(1.0, {"reconstruction": (1.0, head)}) for head in heads]
        HeadMemory([module], TASK).fit(0, levels, SHAPE, together)
        return [head.at_once for head in heads]

    module = needs(48)
    half = fitted(ModuleBytes(module.graph, (module.graph + module.backward) // 2), False)
    assert fitted(module, True) == half != fitted(module, False)


def test_a_network_that_cannot_run_without_values_leaves_one_patch_at_a_time() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    level = Level(1.0, {"reconstruction": (1.0, PatchedHead(partial(DecoderHead, 8, 3, 1), 2, at_once=4))})
    HeadMemory(bytes_of_modules([([Picky()], {"x": TensorSpec((3, 16, 16))})]), TASK).fit(0, [level], SHAPE)
    assert level.heads()[0][1].at_once == 1


@pytest.mark.parametrize("wanted", ["auto", 1, 3])
def test_the_choice_is_the_same_in_every_precision_layout_and_placement(wanted: int | str) -> None:
    """And where a step is only counted."""
    config = tiny_config("infopro", modules=4, patches={"grid": 2, "at_once": wanted})
    found = []
    for ranks, dtype, nhwc in ((1, torch.float32, True), (4, torch.float32, False), (2, torch.bfloat16, True),
                               (2, torch.float64, False)):  # fmt: skip
        plan = tiny_plan(config, ranks)
        numerics = Numerics(CPU, dtype, nhwc)
        modules = [m for rank in range(ranks) for m in build_modules(plan, rank, tiny_blocks(), numerics, fresh=True)]
        found.append(at_once(modules))
    with no_values():
        found.append(at_once(blank_modules(tiny_plan(config), tiny_blocks(), Numerics(CPU, torch.float32, True))))
    assert all(one == found[0] for one in found)
    assert set(found[0]) == {wanted} if wanted != "auto" else set(found[0]) <= {1, 2, 3, 4}


def at_once(modules: list) -> list[int]:
    return [head.at_once for module in modules for level in module.levels.values() for _, head in level.heads()]
