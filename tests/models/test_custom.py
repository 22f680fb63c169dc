"""Networks of one's own, of torchvision and of timm: cut by torch.fx, the same network bit for bit, or refused."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_spawn import run_ranks
from tiny import CLASSES, IMAGE, Batches, tiny_config
from torch import Tensor, nn
from torchvision import models

from pipeline import Config, ConfigError, LoaderData, evaluate, export, load_config, train
from pipeline.base.flow import Flow, TensorSpec
from pipeline.models.backbones import BasicBlock, Blocks
from pipeline.models.boundaries import boundary_specs
from pipeline.models.custom import network_blocks
from pipeline.models.part import uncut_name


class Mine(nn.Module):
    """Functions between modules, a weight of its own, the number of images, a random step in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.layers = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 6, 1))
        self.offset = nn.Parameter(torch.full((1, 6, 1, 1), 0.5))
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.unused = nn.Linear(2, 2)
        self.hidden = nn.Linear(6 * 64, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        images = x.shape[0]
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = self.layers(x) * self.scale + self.offset
        if mask is not None:
            x = x * mask
        x = F.relu(self.hidden(x.view(images, -1)))
        return self.fc(F.dropout(x, 0.5, self.training))


class Branches(nn.Module):
    """A chain of its children, with a check that torch.fx cannot follow; ``skip`` makes it none."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4, CLASSES)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        if x.size(1) != 3:
            raise ValueError("three channels, please")
        h = self.stem(x)
        return self.fc(self.pool(h + h if self.skip else h))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(F.relu(self.first(x))).mean((2, 3)))


def seeded(build: Any, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    network = build(**options)
    assert isinstance(network, nn.Module)
    return network


def resnet() -> nn.Module:
    return seeded(models.resnet18, num_classes=CLASSES)


def vit(image: int = 32, patch: int = 16) -> nn.Module:
    sizes = {"hidden_dim": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 2, "image_size": image, "patch_size": patch}
    return seeded(models.VisionTransformer, dropout=0.1, num_classes=CLASSES, **sizes)


def swin() -> nn.Module:
    sizes = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "patch_size": [4, 4], "window_size": [2, 2]}
    return seeded(models.SwinTransformer, num_classes=CLASSES, stochastic_depth_prob=0.2, **sizes)


def vgg() -> nn.Module:
    layers = models.vgg.make_layers([8, "M", 16, "M"], batch_norm=True)
    network = models.VGG(layers, num_classes=CLASSES)
    network.classifier = nn.Sequential(nn.Linear(16 * 49, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, CLASSES))
    return network


def densenet() -> nn.Module:
    return seeded(models.DenseNet, growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=CLASSES)


NETWORKS = {"mine": Mine, "resnet": resnet, "vit": vit, "swin": swin, "vgg": vgg, "densenet": densenet}


class Shapes(nn.Module):
    """A size of the image, made at the top, is needed at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        height = x.size(2) // 1
        return self.fc(self.second(self.first(x)).sum((2, 3)) / height)


def run_blocks(blocks: Blocks, x: Tensor) -> Tensor:
    flow: Flow = x
    for block in blocks.values():
        flow = block(flow)
    assert isinstance(flow, Tensor)
    return flow


def same_function(network: nn.Module, blocks: Blocks, x: Tensor) -> None:
    """In both modes, with the same random numbers; BatchNorm's statistics move alike."""
    before = copy.deepcopy(network.state_dict())
    for training in (True, False):
        network.train(training)
        for block in blocks.values():
            block.train(training)
        results, after = [], []
        for forward in (network, lambda x: run_blocks(blocks, x)):
            network.load_state_dict(before)
            torch.manual_seed(5)
            results.append(forward(x.clone()))
            after.append(copy.deepcopy(network.state_dict()))
        assert torch.equal(*results)
        assert all(torch.equal(value, after[1][name]) for name, value in after[0].items())
    network.load_state_dict(before)


def names_of(blocks: Blocks) -> list[str]:
    return [uncut_name(f"{name}.{key}") for name, block in blocks.items() for key in block.state_dict()]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_blocks_are_the_network(name: str) -> None:
    network = NETWORKS[name]()
    blocks = network_blocks(network)
    assert len(blocks) >= 4
    assert sorted(names_of(blocks)) == sorted(network.state_dict())
    mine = {id(p) for p in network.parameters()}
    assert {id(p) for block in blocks.values() for p in block.parameters()} == mine
    same_function(network, blocks, torch.randn(2, 3, 8, 8) if name == "mine" else torch.randn(2, 3, 32, 32))


def test_blocks_begin_with_what_has_weights() -> None:
    residual = [f"layer{stage}.{index}" for stage in (1, 2, 3, 4) for index in (0, 1)]
    assert list(network_blocks(resnet())) == ["conv1", *residual, "fc"]
    encoder = [f"encoder.layers.encoder_layer_{index}" for index in (0, 1)]
    assert list(network_blocks(vit())) == ["conv_proj", *encoder, "heads.head"]
    assert list(network_blocks(Mine())) == ["conv", "layers.0", "layers.1", "hidden", "fc"]


def test_weights_that_functions_use_go_where_they_are_used() -> None:
    blocks = network_blocks(vit(), ("encoder", "encoder.layers.encoder_layer_1"))
    assert list(blocks) == ["conv_proj", "encoder", "encoder.layers.encoder_layer_1"]
    assert {uncut_name(f"conv_proj.{key}") for key in blocks["conv_proj"].state_dict()} == {
        "class_token", "conv_proj.weight", "conv_proj.bias"
    }
    assert "encoder.pos_embedding" in {uncut_name(f"encoder.{key}") for key in blocks["encoder"].state_dict()}


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_networks_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "depth": 2} if name.startswith("vit") else {}
    network = seeded(timm.create_model, model_name=name, num_classes=CLASSES, **options)
    blocks = network_blocks(network)
    assert len(blocks) >= 4 and sorted(names_of(blocks)) == sorted(network.state_dict())
    same_function(network, blocks, torch.randn(2, 3, 32, 32))


def test_a_chain_that_cannot_be_traced_is_taken_by_its_children() -> None:
    network = seeded(Branches)
    blocks = network_blocks(network, ("pool",), IMAGE)
    assert list(blocks) == ["stem.0", "stem.1", "pool.0", "pool.1", "fc"]
    same_function(network, blocks, torch.randn(2, *IMAGE))


# --- refusals ---------------------------------------------------------------------------------------------------------


class TwoResults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x), x


@pytest.mark.parametrize(
    ("build", "cuts", "words"),
    [
        (
            Shapes,
            ("second",),
            "a cut before 'second' is crossed by what is no tensor: truediv in the network's forward uses the output "
            "of floordiv in the network's forward behind it; cut before 'fc' instead",
        ),
        (resnet, ("layer22",), "model.cuts: ResNet has no module 'layer22'; did you mean 'layer2'?"),
        (resnet, ("layer3", "layer2"), "'layer2' begins before 'layer3'; give the names in the order"),
        (resnet, ("layer2", "layer2.0"), "'layer2.0' begins where 'layer2' begins; remove one of the two cuts"),
        (resnet, ("conv1",), "'conv1' begins where the network itself begins"),
        (Mine, ("unused",), "'unused' is never called as a module in the forward of Mine"),
        (Tied, ("second",), "a cut before 'second' separates two uses of 'first.weight', which are trained together"),
        (TwoResults, "auto", "returns a tuple, but the last block must give class scores alone"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(build: Any, cuts: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        network_blocks(build(), cuts)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("build", "cuts", "flows"),
    [
        (resnet, ("layer2.1.conv2", "layer2.1.bn2"), [{"x", "layer2_0"}, {"x", "layer2_0"}]),
        (resnet, ("layer2.0.downsample", "layer3"), [{"x", "layer2_0_bn2"}, {"x"}]),
        (vit, ("encoder.layers.encoder_layer_1.mlp",), [{"x", "add_1"}]),
    ],
)
def test_a_skip_connection_crosses_a_cut(build: Any, cuts: tuple[str, ...], flows: list[set[str]]) -> None:
    """Under the name of what makes it; "x" is what the module behind the cut takes."""
    network = build()
    blocks = network_blocks(network, cuts)
    x = torch.randn(2, 3, 32, 32)
    specs = boundary_specs(blocks, {"x": TensorSpec((3, 32, 32))}, cuts)
    assert [set(spec) for spec in specs.values()] == [*flows, {"x"}]
    same_function(network, blocks, x)


def test_tied_weights_stay_in_one_block() -> None:
    assert list(network_blocks(Tied())) == ["first", "fc"]


@pytest.mark.parametrize(("skip", "cuts"), [(True, "auto"), (False, ("stem.0.weight",))])
def test_what_cannot_be_traced_and_is_no_chain_is_refused(skip: bool, cuts: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        network_blocks(Branches(skip), cuts, IMAGE)
    line = str(refusal.value)
    assert "\n" not in line
    if skip:
        assert "the forward of Branches cannot be traced (test_custom.py:" in line and "no chain" in line


# --- training ---------------------------------------------------------------------------------------------------------


def settings(*cuts: str, **sections: Any) -> Config:
    model = {"cuts": list(cuts)} if cuts else {"cuts": "even"}
    modules = len(cuts) + 1
    return tiny_config("dgl", modules=modules, model=model, train={"epochs": 1}, **sections)


def test_one_module_is_plain_backpropagation() -> None:
    network = seeded(Mine).eval()
    whole = copy.deepcopy(network)
    x, labels = torch.randn(4, *IMAGE), torch.arange(4)
    F.cross_entropy(run_blocks(network_blocks(network), x), labels).backward()
    F.cross_entropy(whole(x), labels).backward()
    for (name, mine), other in zip(network.named_parameters(), whole.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        assert mine.grad is None or other.grad is None or torch.equal(mine.grad, other.grad), name


def trained(rank: int, folder: str, *cuts: str) -> tuple[str, dict[str, Any]]:
    """The digest of a run, and the caller's network after it, as arrays that a process can send."""
    torch.set_num_threads(1)
    network = seeded(Mine)
    data = LoaderData(Batches(), Batches())
    summary = train(settings(*cuts), network=network, data=data, run_dir=Path(folder), quiet=True)
    return summary["weights_sha256"], {name: value.numpy() for name, value in network.state_dict().items()}


def test_a_cut_by_names_trains_alike_on_one_rank_and_on_two(tmp_path: Path) -> None:
    cuts = ("layers.0", "layers.1", "fc")
    start = seeded(Mine).state_dict()
    digest, arrays = trained(0, str(tmp_path / "one"), *cuts)
    state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    results = run_ranks(trained, 2, str(tmp_path / "two"), *cuts)
    assert [result.value[0] for result in results] == [digest] * 2
    file = torch.load(tmp_path / "two" / "model.pt", weights_only=True)
    seeded(Mine).load_state_dict(file, strict=True)
    for name, value in state.items():  # the caller's own weights, on the rank that owns them
        owner = 0 if name.startswith(("conv", "norm", "layers.0")) else 1
        assert torch.equal(torch.from_numpy(results[owner].value[1][name]), value), name
        assert torch.equal(file[name], value), name
        changes = not name.startswith("unused")
        assert torch.equal(value, start[name]) != changes, name
    export(tmp_path / "one", tmp_path / "mine.pt")
    exported = torch.load(tmp_path / "mine.pt", weights_only=True)
    assert exported.keys() == state.keys() and all(torch.equal(exported[name], state[name]) for name in state)
    tested = evaluate(tmp_path / "one", network=seeded(Mine), data=LoaderData(Batches(), Batches()))
    assert [row.blocks for row in tested.rows if row.exit == "independent"] == ["conv", "layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("network", "cuts"),
    [
        (resnet, ("layer2", "layer3.1")),
        (functools.partial(vit, IMAGE[1], 4), ("encoder.layers.encoder_layer_1", "encoder.ln")),
    ],
    ids=["resnet18", "ViT"],
)
def test_a_torchvision_network_trains_as_it_is(
    network: Callable[[], nn.Module], cuts: tuple[str, ...], tmp_path: Path
) -> None:
    """A ViT's local modules end in tokens (B, T, D), of which a head takes the mean."""
    summary = train(
        settings(*cuts), network=network(), data=LoaderData(Batches(), Batches()), run_dir=tmp_path, quiet=True
    )
    assert all(math.isfinite(value) for head in summary["heads"] for value in head["losses"].values())
    network().load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_names_of_cuts_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[model]\nname = "resnet18"\ncuts = ["layer1", "layer2.1"]\n')
    lines: list[str] = []
    config = load_config(file=file, say=lines.append)
    assert config.model.cuts == ("layer1", "layer2.1") and config.model.modules == 3
    assert lines == [
        "model.modules = 4 gives way to 3: one local module begins at every cut, and model.cuts = ['layer1', "
        "'layer2.1'] is set"
    ]
    assert load_config(assignments=['model.cuts=["layer1.1", "layer3"]']).model.modules == 3
    with pytest.raises(ConfigError, match=r"makes 2 local modules, but model.modules = 5; use model.modules=2"):
        load_config(assignments=['model.cuts=["layer2"]', "model.modules=5"])
