"""Networks of one's own, of torchvision and of timm in local modules: the same weights on any number of ranks."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_spawn import run_ranks
from tiny import CLASSES, tiny_config
from torch import Tensor, nn
from torchvision import models, ops
from torchvision.models import swin_transformer

from pipeline import Config, LoaderData, evaluate, train

SIDE, ROWS, STEPS = 32, 8, 2


class Skips(nn.Module):
    """A mask of the image and a skip connection live on beside what the modules work on.

    x --> stem --+--> down --> mid --> up --> add --> last --> mean --> fc
          mask --|----> *       *      *       |
                 +-----------------------------+
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.mid, self.up, self.last = (
            nn.Sequential(nn.Conv2d(i, 6, 3, padding=1), nn.BatchNorm2d(6)) for i in (3, 6, 6, 6, 6)
        )
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        shown = x.mean(dim=1, keepdim=True) > -0.5
        skip = F.relu(self.stem(x))
        h = self.down(skip) * shown
        h = F.relu(self.mid(h)) * shown
        h = F.relu(self.up(h)) * shown
        return self.fc(self.last(h + skip).mean(dim=(2, 3)))


def seeded(build: Callable[[], Any]) -> nn.Module:
    torch.manual_seed(3)
    network = build()
    assert isinstance(network, nn.Module)
    return network


def of_timm(name: str, **options: Any) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
    return network


def swin(**parts: Any) -> nn.Module:
    sizes = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "patch_size": [4, 4], "window_size": [2, 2]}
    return models.SwinTransformer(num_classes=CLASSES, stochastic_depth_prob=0.2, **sizes, **parts)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "skips": Skips,
    "swin": swin,
    "swin v2": functools.partial(
        swin, block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2
    ),
    "resnet": functools.partial(of_timm, "resnet10t", channels=(8, 8, 16, 16), stem_width=8),
    "vit": functools.partial(
        of_timm, "vit_tiny_patch16_224", img_size=SIDE, patch_size=8, depth=4, embed_dim=24, num_heads=3
    ),
}
Case = tuple[str, tuple[str, ...], int, dict[str, dict[str, Any]]]
"""Network, cuts, cascade span, other settings."""
CASES: dict[str, Case] = {
    "skips, k=1": ("skips", ("mid", "up", "last"), 1, {"patches": {"grid": 2, "at_once": 4}}),
    "skips, k=2": ("skips", ("mid", "up", "last"), 2, {"schedule": {"micro_batches": 2}}),
    "skips, k=K": ("skips", ("down", "mid", "up"), 4, {}),
    "skips, async": ("skips", ("mid", "up", "last"), 2, {"schedule": {"kind": "async"}}),
    "Swin, k=1": ("swin", ("features.3", "features.5"), 1, {"patches": {"grid": 2, "at_once": 4}}),
    "Swin, k=2": ("swin", ("features.2", "features.3", "features.5"), 2, {}),
    "Swin v2, k=1": ("swin v2", ("features.3", "norm"), 1, {"patches": {"grid": 2, "at_once": 4}}),
}
TIMM: dict[str, Case] = {
    "ResNet, k=1": ("resnet", ("layer2", "layer3", "layer4"), 1, {"patches": {"grid": 2, "at_once": 4}}),
    "ResNet, a skip connection": ("resnet", ("layer2", "layer3.0.conv2"), 2, {}),
    "ViT, k=1": ("vit", ("blocks.1", "blocks.2", "blocks.3"), 1, {"patches": {"grid": 2, "at_once": 4}}),
    "ViT, k=2": ("vit", ("blocks.2", "blocks.3"), 2, {}),
    "ViT, async": ("vit", ("blocks.2", "blocks.3"), 2, {"schedule": {"kind": "async"}}),
}
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(ROWS, 3, SIDE, SIDE, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator))
        for _ in range(STEPS)
    ]


def settings(cuts: tuple[str, ...], span: int, **sections: dict[str, Any]) -> Config:
    model = {"cuts": list(cuts)} if cuts else {}
    return tiny_config("dgl", "plain", span, len(cuts) + 1, model=model, train={"epochs": 1}, **sections)


def trained(rank: int, folder: str, cases: dict[str, Case]) -> dict[str, tuple[str, int]]:
    """Digest of the weights, and steps, of every case on these ranks."""
    torch.set_num_threads(1)
    found = {}
    for number, (name, (network, cuts, span, sections)) in enumerate(cases.items()):
        data, whole = LoaderData(batches(), batches()), seeded(NETWORKS[network])
        summary = train(
            settings(cuts, span, **sections), network=whole, data=data, run_dir=Path(folder) / str(number), quiet=True
        )
        found[name] = summary["weights_sha256"], summary["steps"]
    return found


@pytest.mark.parametrize("cases", [CASES, pytest.param(TIMM, marks=needs_timm)], ids=["own", "timm"])
def test_the_same_weights_on_one_rank_and_on_two(cases: dict[str, Case], tmp_path: Path) -> None:
    alone = trained(0, str(tmp_path / "1"), cases)
    assert {steps for _, steps in alone.values()} == {STEPS}
    assert len({digest for digest, _ in alone.values()}) == len(cases)
    results = run_ranks(trained, 2, str(tmp_path / "2"), cases, timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    assert results[0].value == alone
    for number, (network, *_) in enumerate(cases.values()):
        whole = seeded(NETWORKS[network])
        whole.load_state_dict(torch.load(tmp_path / "2" / str(number) / "model.pt", weights_only=True), strict=True)
        data = LoaderData(batches(), batches())
        found = evaluate(tmp_path / "1" / str(number), network=seeded(NETWORKS[network]), data=data)
        assert found.images == ROWS * STEPS


def test_one_module_is_the_network_trained_plainly(tmp_path: Path) -> None:
    config, plain = settings((), 1, precision={"channels_last": "off"}), seeded(Skips)
    network = copy.deepcopy(plain)
    train(config, network=network, data=LoaderData(batches(), batches()), run_dir=tmp_path / "run", quiet=True)
    chosen = config.optim
    optimiser = torch.optim.SGD(
        plain.parameters(), chosen.lr, chosen.momentum, weight_decay=chosen.weight_decay, nesterov=chosen.nesterov
    )
    plain.train()
    for x, labels in batches():
        F.cross_entropy(plain(x), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    for (name, value), other in zip(plain.state_dict().items(), network.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def turned(first: bool) -> nn.Module:
    """Linear layers on (B, H, W, C) with a cut between them, where the map is turned to (B, C, H, W) if ``first``."""
    torch.manual_seed(5)
    there = OrderedDict(turn=ops.Permute([0, 2, 3, 1]))
    a = OrderedDict(conv=nn.Conv2d(3, 6, 4, 4), **there, mix=nn.Linear(6, 6))
    b = OrderedDict(mix=nn.Linear(6, 6), back=ops.Permute([0, 3, 1, 2]), pool=nn.AdaptiveAvgPool2d(1), end=nn.Flatten())
    b["fc"] = nn.Linear(6, CLASSES)
    if first:
        a["out"], b = ops.Permute([0, 3, 1, 2]), OrderedDict(there, **b)
    return nn.Sequential(OrderedDict(a=nn.Sequential(a), b=nn.Sequential(b)))


def test_heads_and_patches_see_a_map_of_swin_as_any_other(tmp_path: Path) -> None:
    config = settings(("b",), 2, patches={"grid": 2}, precision={"compute": "fp64"})
    states = []
    for first in (False, True):
        network = turned(first)
        train(config, network=network, data=LoaderData(batches(), batches()), run_dir=tmp_path / str(first), quiet=True)
        states.append(network.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-9, atol=1e-12, msg=name)
