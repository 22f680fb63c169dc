"""AugLocal, DeInfoReg and LoPT against their formulas, written out by hand: float64, losses and gradients to 1e-12.

Networks and parameters of heads are shared with the runtime; layers of heads, losses and paths are not.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from tiny import CLASSES, gradients, tiny_batch, tiny_config, tiny_stage, train_on, without_updates
from tiny_features import DEPTH, LENGTH, configured, features, transformer
from torch import Tensor, nn

from pipeline import ConfigError, NextToken, build_blocks
from pipeline.base.config import Config, MethodConfig
from pipeline.base.flow import TensorSpec
from pipeline.base.numerics import Numerics
from pipeline.base.validation import with_values
from pipeline.edges.connect import Edges
from pipeline.local.auglocal import chosen
from pipeline.local.local_module import LocalModule
from pipeline.local.methods import method_terms
from pipeline.local.task import Classification
from pipeline.models.heads import FeatureShape, Given
from pipeline.models.patches import PatchedHead
from pipeline.models.unbuilt import planned_blocks, without_memory
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage

TOLERANCE = 1e-12
Loss = Callable[[LocalModule, str, Tensor, Tensor, Tensor], Tensor]
"""(module, level, its input, its output, labels) -> the local loss."""


# --- the formulas -----------------------------------------------------------------------------------------------------


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, layer.weight) + layer.bias


def batch_norm(layer: nn.Module, x: Tensor) -> Tensor:
    mean = x.sum(0) / len(x)
    spread = ((x - mean) ** 2).sum(0) / len(x)
    return (x - mean) / (spread + layer.eps) ** 0.5 * layer.weight + layer.bias


def lopt(module: LocalModule, level: str, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    norm, narrow, _, wide = module.levels[level].terms["reconstruction"].heads[0].decoder
    depth = h.shape[-1]
    assert narrow.weight.shape == (depth // 4, depth)
    mean = h.sum(-1, keepdim=True) / depth
    spread = ((h - mean) ** 2).sum(-1, keepdim=True) / depth
    inner = linear(narrow, (h - mean) / (spread + norm.eps) ** 0.5 * norm.weight + norm.bias)
    found = linear(wide, inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
    return ((found - x.detach()) ** 2).sum() / x.numel()


def convolution(layer: nn.Module, x: Tensor) -> Tensor:
    """Of 3x3 with a border of 1, or of 1x1."""
    side, step = layer.weight.shape[-1], layer.stride[0]
    x = nn.functional.pad(x, [side // 2] * 4)
    rows, columns = ((x.shape[axis] - side) // step + 1 for axis in (2, 3))
    return sum(
        torch.einsum(
            "bchw,oc->bohw",
            x[:, :, i : i + step * rows : step, j : j + step * columns : step],
            layer.weight[:, :, i, j],
        )
        for i in range(side)
        for j in range(side)
    )


def map_norm(layer: nn.Module, x: Tensor) -> Tensor:
    flat = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return batch_norm(layer, flat).view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


def residual(block: nn.Module, x: Tensor) -> Tensor:
    inner = map_norm(block.bn1, convolution(block.conv1, x)).relu()
    inner = map_norm(block.bn2, convolution(block.conv2, inner))
    if block.downsample is not None:
        x = map_norm(block.downsample[1], convolution(block.downsample[0], x))
    return (inner + x).relu()


FORMS = {  # depth -> (in, out, stride) of every copy, by module; modules: blocks 0 and 1 | 2 | 3 | 4 and the classifier
    1: {0: [(4, 6, 2)], 1: [(6, 6, 1)], 2: [(6, 6, 1)]},  # the first one has the form of block 4, built for 4 channels
    2: {0: [(4, 6, 2), (6, 6, 1)], 1: [(6, 6, 1)] * 2, 2: [(6, 6, 1)]},
    3: {0: [(4, 6, 2), (6, 6, 1), (6, 6, 1)], 1: [(6, 6, 1)] * 2, 2: [(6, 6, 1)]},
}


def auglocal(module: LocalModule, level: str, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    head = module.levels[level].terms["task"].heads[0]
    blocks = list(head.blocks)
    for block in blocks:
        h = residual(block, h)
    pooled = h.sum((2, 3)) / (h.shape[2] * h.shape[3])
    *norm, last = list(head.head.head)[2:]
    assert len(norm) == (len(blocks) <= 1)
    scores = linear(last, batch_norm(norm[0], pooled) if norm else pooled)
    return sum(row.exp().sum().log() - row[label] for row, label in zip(scores, labels, strict=True)) / len(h)


def deinforeg(module: LocalModule, level: str, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    head = module.levels[level].terms["information"].heads[0]
    first, norm, _, second, other_norm, _, third = head.projector[2:]
    z = h.reshape(len(h), -1)
    z = batch_norm(norm, linear(first, z)).relu()
    z = linear(third, batch_norm(other_norm, linear(second, z)).relu())
    last_norm, _, scores = head.classifier
    scores = linear(scores, batch_norm(last_norm, z).relu())
    rows, width = z.shape
    u = torch.stack([row / (row**2).sum() ** 0.5 for row in z])
    centred = u - u.sum(0) / rows

    variance = sum((1 - ((centred[:, j] ** 2).sum() / (rows - 1) + 1e-7) ** 0.5).relu() for j in range(width)) / width
    covariance = sum(
        ((centred[:, i] * centred[:, j]).sum() / rows) ** 2 for i in range(width) for j in range(width) if i != j
    )

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.sum() / len(a), b - b.sum() / len(b)
        return (a @ b / ((1e-8 + (a @ a) ** 0.5) * (1e-8 + (b @ b) ** 0.5))).clamp(-1, 1)

    wanted = torch.zeros(rows, CLASSES, dtype=z.dtype)
    for row, label in enumerate(labels):
        wanted[row, label] = 1.0
    invariance = sum(
        (similarity(u[a], u[b]) - similarity(wanted[a], wanted[b])) ** 2 for a in range(rows) for b in range(rows)
    )
    entropy = sum(row.exp().sum().log() - row[label] for row, label in zip(scores, labels, strict=True)) / rows
    return variance / rows + covariance / width + invariance / rows**2 + 0.001 * entropy


# --- a step -----------------------------------------------------------------------------------------------------------


def literal(modules: list[LocalModule], loss: Loss, config: Config, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Every path of every loss is evaluated anew; the losses by module and level."""
    for module in modules:
        for part in (*module.blocks.values(), *module.levels.values()):
            part.train()

    def through(index: int, h: Tensor) -> Tensor:
        for block in modules[index].blocks.values():
            h = block(h)
        return h

    entrances = [x]
    for index in range(len(modules)):
        entrances.append(through(index, entrances[-1]).detach())
    found = {}
    for m, module in enumerate(modules[:-1]):
        for level in module.levels:
            low = m if level == "independent" else max(0, m - config.hierarchy.cascade_span + 1)
            h = entrances[low]
            for index in range(low, m + 1):
                h = through(index, h)
            value = loss(module, level, entrances[m], h, labels)
            weight = getattr(config.hierarchy, f"{level}_weight")
            (weight * value).backward()
            found[f"{m}.{level}"] = float(value.detach())
    nn.functional.cross_entropy(through(len(modules) - 1, entrances[-2]), labels).backward()
    return found


def check(stage: Stage, modules: list[LocalModule], batch: Batch, loss: Loss, config: Config) -> None:
    reference = copy.deepcopy(modules)
    train_on(without_updates(stage), 0, 0, batch)
    expected = literal(reference, loss, config, batch.x, batch.labels)

    mine, theirs = gradients(modules), gradients(reference)
    scale = max(float(g.norm()) for g in theirs.values() if g is not None)
    for name, gradient in theirs.items():
        found = mine[name]
        assert found is not None and gradient is not None, name
        # a bias before a BatchNorm has an exact gradient of 0: noise is judged on the scale of all gradients
        assert float((found - gradient).norm()) <= TOLERANCE * max(float(gradient.norm()), 1e-2 * scale), name
    for name, value in expected.items():
        index, level = name.split(".")
        (term,) = modules[int(index)].levels[level].terms
        kept = modules[int(index)].losses.open[0][f"{level}.{term}"]
        assert abs(float(kept) - value) <= TOLERANCE * abs(value), name


@pytest.mark.parametrize(("span", "depth"), [(1, 1), (2, 2), (4, 3)])
def test_auglocal_is_its_formula(span: int, depth: int) -> None:
    weights = {"independent_weight": 0.5, "cascade_weight": 0.25, "final_loss": "local"}
    config = configured(span, {"name": "auglocal", "depth": depth}, hierarchy=weights)
    stage, modules, _ = tiny_stage(config, torch.float64)
    for module in modules:
        for level in module.levels.values():
            convolutions = [block.conv1 for block in level.terms["task"].heads[0].blocks]
            forms = [(conv.in_channels, conv.out_channels, conv.stride[0]) for conv in convolutions]
            assert forms == FORMS[depth][module.plan.index]
    check(stage, modules, tiny_batch(dtype=torch.float64), auglocal, config)


@pytest.mark.parametrize("span", [1, 2, 4])
def test_deinforeg_is_its_formula(span: int) -> None:
    weights = {"independent_weight": 0.5, "cascade_weight": 0.25, "final_loss": "local"}
    config = configured(span, {"name": "deinforeg", "feature_dim": 8}, hierarchy=weights)
    stage, modules, _ = tiny_stage(config, torch.float64)
    check(stage, modules, tiny_batch(dtype=torch.float64), deinforeg, config)


@pytest.mark.parametrize("span", [1, 2, 4])
def test_lopt_is_its_formula(span: int) -> None:
    weights = {"independent_weight": 10.0, "cascade_weight": 0.25, "final_loss": "local"}
    config = configured(span, {"name": "lopt"}, hierarchy=weights)
    x, labels = features(0, torch.float64)
    blocks = dict(transformer().named_children())
    specs = {"x": TensorSpec((LENGTH, DEPTH))}
    plan = make_plan(config, blocks, Classification(CLASSES, (LENGTH, DEPTH)), 1, specs)
    modules = build_modules(plan, 0, blocks, Numerics(torch.device("cpu"), torch.float64, False), fresh=True)
    stage = Stage(modules, plan.schedules[0], BatchInlet(), Edges())
    check(stage, modules, Batch(x, labels, None), lopt, config)


def test_the_first_module_of_lopt_reconstructs_its_embedding() -> None:
    """What comes out of the first block of a network that is given ids; its other modules what they take."""
    settings = {"method.name": "lopt", "model.cuts": "even"}
    config = with_values(tiny_config("greedy", "plain", 1, 3), settings)
    task = NextToken(5, (LENGTH,))
    torch.manual_seed(1)
    blocks = build_blocks(f"decoder/4x{DEPTH}x2", LENGTH, 5)
    plan = make_plan(config, blocks, task, 1)
    modules = build_modules(plan, 0, blocks, Numerics(torch.device("cpu"), torch.float64, False), fresh=True)
    ids = torch.randint(5, (4, LENGTH))
    stage = without_updates(Stage(modules, plan.schedules[0], BatchInlet(), Edges()))
    train_on(stage, 0, 0, Batch(ids, ids, ids))
    h, taken = ids, []
    for module in modules[:2]:
        outputs = []
        for block in module.blocks.values():
            h = block(h)
            outputs.append(h)
        taken.append(h)
        target = outputs[0] if module is modules[0] else taken[0]
        expected = lopt(module, "independent", target, h, ids)
        found = module.losses.open[0]["independent.reconstruction"]
        torch.testing.assert_close(found, expected.detach(), rtol=TOLERANCE, atol=0)
    assert not any(block._forward_hooks for module in modules for block in module.blocks.values())


def test_the_pyramid_of_auglocal_is_the_published_one() -> None:
    """ResNet-32, d = 3: 13 modules, the last of four blocks; the first head copies the blocks 5, 10 and 15."""
    blocks = planned_blocks("resnet32", 3, 10)
    model = {"name": "resnet32", "cuts": list(blocks)[1:13], "modules": 13}
    config = dataclasses.replace(tiny_config("dgl", "plain", 1, 13, model=model), method=MethodConfig(name="auglocal"))
    plan = make_plan(config, blocks, Classification(10, (3, 32, 32)), 1)
    found = [without_memory(plan.level_builders(m)["independent"]).terms["task"].first.blocks for m in range(12)]
    assert [len(copies) for copies in found] == [3] * 6 + [2] * 6
    assert [[c.conv1.in_channels, c.conv1.out_channels, c.conv1.stride[0]] for c in found[0]] == [
        [16, 16, 1],
        [16, 32, 2],
        [32, 64, 2],
    ]
    assert [block.index for block in chosen(plan.later[0][:-1], 3)] == [5, 10, 15]


def test_torchvision_blocks_are_built_anew_for_another_width() -> None:
    blocks = planned_blocks("resnet50", 3, 10)
    model = {"name": "resnet50", "cuts": ["layer1.0"], "modules": 2}
    config = dataclasses.replace(
        tiny_config("dgl", "plain", 1, 2, model=model), method=MethodConfig(name="auglocal", depth=2)
    )
    plan = make_plan(config, blocks, Classification(10, (3, 64, 64)), 1)
    level = plan.level_builders(0)["independent"]()
    first, second = level.terms["task"].first.blocks
    assert [(b.conv1.in_channels, b.conv2.stride[0], b.conv3.out_channels) for b in (first, second)] == [
        (64, 2, 1024),
        (1024, 2, 2048),
    ]
    assert level.logits(torch.randn(2, 64, 16, 16)).shape == (2, 10)


def test_a_block_that_cannot_be_copied_is_refused_in_one_line() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    layers = OrderedDict(a=nn.Conv2d(3, 4, 1), b=Scaled(), c=nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES)))
    config = dataclasses.replace(tiny_config("dgl", "plain", 1, 2), method=MethodConfig(name="auglocal"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, cuts=("b",)))
    plan = make_plan(config, layers, Classification(CLASSES, (3, 8, 8)), 1)
    with pytest.raises(ConfigError, match="block 'b' into a head, but only its own constructor fills scale; use dgl"):
        plan.level_builders(0)["independent"]()


# --- heads ------------------------------------------------------------------------------------------------------------


def head(name: str, shape: FeatureShape, **settings: int) -> nn.Module:
    (term,) = method_terms(MethodConfig(name=name, **settings), Classification(CLASSES, shape), 0.0)
    return term.make(shape)


def test_the_reconstruction_of_patches_is_compared_with_the_patches_of_the_input() -> None:
    torch.manual_seed(0)
    patched = PatchedHead(lambda: head("lopt", (3, DEPTH)), 2).double()
    h, x = torch.randn(2, 4, 6, DEPTH, dtype=torch.float64)
    _, found = patched.backward(h, Given(torch.zeros(4), inputs={"x": x}), 1.0)
    decoder = patched.of(0).decoder
    expected = ((decoder(h) - x) ** 2).mean()  # patches of one length: the mean of means
    torch.testing.assert_close(found, expected.detach(), rtol=TOLERANCE, atol=0)


def test_a_first_reconstruction_is_small() -> None:
    decoder = head("lopt", (5, 64)).decoder
    for layer in (decoder[1], decoder[3]):
        bound = 0.1 * math.sqrt(6 / (64 + 16))
        assert not layer.bias.any() and 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound


def test_deinforeg_takes_sequences_and_vectors_and_gives_scores() -> None:
    for shape in ((3, 4, 4), (5, 6), (7,)):
        scores = head("deinforeg", shape, feature_dim=8).logits(torch.randn(4, *shape))
        assert scores.shape == (4, CLASSES)


def test_what_lopt_cannot_reconstruct_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"'lopt' is for transformers, but a local module ends in \(3, 8, 8\)"):
        head("lopt", (3, 8, 8))
    built = head("lopt", (LENGTH, DEPTH))
    given = Given(torch.zeros(2), inputs={"x": torch.zeros(2, LENGTH, dtype=torch.int64)})
    with pytest.raises(ConfigError, match=r"takes rows of \(6,\) and gives \(6, 8\); give the network features"):
        built.loss(torch.zeros(2, LENGTH, DEPTH), given)


@pytest.mark.parametrize("name", ["deinforeg", "lopt"])
def test_another_head_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"method.head = 'mlp': {name} has one fixed head; remove method.head"):
        head(name, (LENGTH, DEPTH), head="mlp")
