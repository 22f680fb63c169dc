"""A planned network: shapes without memory; drawn block by block, to the bits that the whole network would have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers_shapes import RealTensors, boundary_shapes
from torch import Tensor, nn

from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics, stable_hash
from pipeline.base.recipes import load_config
from pipeline.local.task import Classification
from pipeline.local.weights import module_weights, weights_sha256
from pipeline.models import backbones
from pipeline.models.backbones import Blocks, build_blocks, initialise, register_backbone
from pipeline.models.unbuilt import drawn_blocks, is_planned, planned_blocks
from pipeline.plan.assembly import build_modules, make_plan

CPU = Numerics(torch.device("cpu"), torch.float32, False)


@pytest.fixture
def registered() -> Iterator[Callable[[str, Callable[[], Blocks]], str]]:
    names = []

    def register(name: str, build: Callable[[], Blocks]) -> str:
        register_backbone(name, lambda in_channels, classes: build())
        names.append(name)
        return name

    yield register
    for name in names:
        del backbones._BACKBONES[name]


def flat(middle: nn.Module) -> Blocks:
    """8x8 images, three blocks, ``middle`` between two linear ones."""
    first = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    return OrderedDict(first=first, middle=middle, last=nn.Linear(4, 10))


def seed_of(name: str) -> int:
    return stable_hash(0, "block", name)


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_drawn_blocks_are_those_of_a_network_built_at_once(name: str) -> None:
    planned, real = planned_blocks(name, 3, 10), build_blocks(name, 3, 10)
    image = (3, 32, 32) if name == "resnet20" else (3, 64, 64)
    assert all(map(is_planned, [block for block in planned.values() if list(block.parameters())]))
    assert boundary_shapes(planned, image) == boundary_shapes(real, image)
    drawn = drawn_blocks(planned, planned, seed_of, lambda: pytest.fail("the whole network was built"))
    for block_name, block in real.items():
        torch.manual_seed(seed_of(block_name))
        initialise(block)
        state = drawn[block_name].state_dict()
        assert state.keys() == block.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())


@pytest.mark.parametrize("method", ["dgl", "infopro", "infopro-contrast", "predsim", "greedy"])
def test_planning_makes_no_tensor_and_changes_no_random_state(method: str) -> None:
    config = load_config(assignments=[f"method.name={method}", "model.cuts=even", "patches.grid=2"])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with RealTensors() as real:
        blocks = planned_blocks("resnet32", 3, 10)
        make_plan(config, blocks, Classification(10, (3, 32, 32)), 4)
    assert not real.found
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rank_makes_only_its_own_blocks_real() -> None:
    config = load_config(assignments=["model.modules=4", "model.cuts=even"])
    blocks = planned_blocks("resnet32", 3, 10)
    plan = make_plan(config, blocks, Classification(10, (3, 32, 32)), 4)
    build_modules(plan, 1, blocks, CPU, fresh=True)
    for module, names in enumerate(plan.cut.modules):
        for name in names:
            assert is_planned(blocks[name]) == (module != 1 and any(True for _ in blocks[name].parameters())), name


class Scaled(nn.Module):
    """A weight that nothing re-draws, as a class token is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale * self.mask


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Peeking(nn.Linear):
    """A layer that looks at its values while it is built."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.norm = float(self.weight.norm().item())


@pytest.mark.parametrize("middle", [Scaled, Tied, Peeking])
def test_unusual_networks_get_the_same_weights_on_every_placement(
    middle: type[nn.Module], registered: Callable[[str, Callable[[], Blocks]], str]
) -> None:
    name = registered(f"with-{middle.__name__}", lambda: flat(middle()))
    digests = set()
    for ranks, unrelated in ((1, 1), (3, 2)):
        torch.manual_seed(unrelated)
        settings = [f"model.name={name}", "model.modules=3", "model.cuts=even", "method.name=greedy"]
        config = load_config(assignments=settings)
        plan = make_plan(config, planned_blocks(name, 3, 10), Classification(10, (3, 8, 8)), ranks)
        modules = []
        for rank in range(ranks):  # each rank has a network of its own
            blocks = planned_blocks(name, 3, 10, config.train.seed)
            modules += build_modules(plan, rank, blocks, CPU, fresh=True)
        assert all(bool(p.isfinite().all()) for m in modules for p in m.parameters)
        digests.add(weights_sha256(list(map(module_weights, modules))))
        built = modules[1].blocks["middle"]
        assert not isinstance(built, Tied) or built.a.weight is built.b.weight
        assert not isinstance(built, Scaled) or built.mask.tolist() == [True, False, True, True]
    assert len(digests) == 1


def test_a_name_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no known backbone"):
        planned_blocks("resnet33", 3, 10)
