"""Networks of torchvision and timm by name: begun with their weights, trained in local modules, and back in theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from pipeline import ConfigError, evaluate, export, load_config, load_exported, load_model, train
from pipeline.base.config import Config
from pipeline.base.numerics import Numerics
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Classification
from pipeline.local.weights import module_weights, weights_sha256
from pipeline.models import backbones
from pipeline.models.backbones import Blocks, Sides, register_sized
from pipeline.models.custom import network_blocks
from pipeline.models.part import uncut_name
from pipeline.models.pretrained import PretrainedWeights
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan.assembly import build_modules, make_plan

CPU = Numerics(torch.device("cpu"), torch.float32, False)
SETTINGS = (
    *("method.name=greedy", "model.modules=3", "model.cuts=even", "patches.at_once=1", "partition.kind=count"),
    *("train.max_steps=1", "data.batch_size=8", "optim.warmup_epochs=0", "optim.schedule=constant", "optim.lr=1e-5"),
    *("runtime.device=cpu", "runtime.threads=1", "precision.compute=fp32", "log.curve=false"),
)


def vit(classes: int = 10, side: int = 32) -> nn.Module:
    sizes = {"hidden_dim": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 3, "image_size": side, "patch_size": 8}
    network = models.VisionTransformer(num_classes=classes, **sizes)
    nn.init.normal_(network.heads.head.weight)  # it begins with zeros
    return network


def small_vit(in_channels: int, classes: int, sides: Sides | None) -> Blocks:
    return network_blocks(vit(classes, (sides or (32, 32))[0]))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """torchvision's network, in a size that tests have time for."""
    register_sized("small_vit", small_vit)
    yield
    del backbones._BACKBONES["small_vit"]


def config(name: str, *assignments: str) -> Config:
    return load_config(assignments=[f"model.name={name}", *SETTINGS, *assignments])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def saved(network: nn.Module, folder: Path) -> Path:
    torch.save(network.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def begun_with_their_weights(name: str, theirs: nn.Module, again: nn.Module, folder: Path) -> dict[str, Any]:
    """Trains a step from the weights of ``theirs``; its export in ``again``, strictly, computes what our model does."""
    chosen = config(name, f"model.weights={saved(theirs, folder)}")
    summary = train(chosen, run_dir=folder / "run", quiet=True)
    exported = export(folder / "run", folder / "out.pt")
    again.load_state_dict(torch.load(exported.path, weights_only=True), strict=True)
    ours = load_model(chosen, 10, sides=(32, 32))
    ours.load_state_dict(torch.load(folder / "run" / "model.pt", weights_only=True), strict=True)
    assert torch.equal(logits(again), logits(ours))
    assert not torch.equal(logits(again), logits(theirs))
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=0.01)  # a small step away
    return summary


def test_a_network_of_torchvision_goes_in_and_comes_out(tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = vit()
    summary = begun_with_their_weights("small_vit", theirs, vit(), tmp_path)
    assert summary["steps"] == 1
    hub = export(tmp_path / "run", tmp_path / "hub", fmt="hub").path
    model = vit()
    model.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert torch.equal(logits(load_exported(hub)), logits(model))
    assert evaluate(tmp_path / "run").test_error_pct == pytest.approx(summary["test_error_pct"])


def test_a_network_of_timm_goes_in_and_comes_out(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    theirs, again = (timm.create_model("test_vit3", num_classes=10, img_size=32) for _ in range(2))
    begun_with_their_weights("timm/test_vit3", theirs, again, tmp_path)


def of_all_ranks(chosen: Config, ranks: int, pretrained: PretrainedWeights | None) -> list[LocalModule]:
    """The local modules as each of these ranks builds its own."""
    modules = []
    for rank in range(ranks):
        torch.manual_seed(rank)  # unrelated
        blocks = planned_blocks("small_vit", 3, 10, chosen.train.seed, (32, 32))
        plan = make_plan(chosen, blocks, Classification(10, (3, 32, 32)), ranks)
        modules += build_modules(plan, rank, blocks, CPU, True, pretrained)
    return modules


def is_in(theirs: nn.Module, modules: list[LocalModule]) -> bool:
    held = {uncut_name(key): value for module in modules for key, value in module_weights(module).items()}
    return all(torch.equal(value, held[key]) for key, value in theirs.state_dict().items())


def test_weights_are_the_librarys_or_the_files_on_every_placement(tmp_path: Path) -> None:
    chosen = config("small_vit")
    torch.manual_seed(chosen.train.seed)
    drawn, file = vit(), vit()
    pretrained = PretrainedWeights(str(saved(file, tmp_path)), "small_vit", planned_blocks("small_vit", 3, 10), 10)
    for theirs, weights in ((drawn, None), (file, pretrained)):
        alone, three = of_all_ranks(chosen, 1, weights), of_all_ranks(chosen, 3, weights)
        assert is_in(theirs, alone) and is_in(theirs, three)
        assert weights_sha256(list(map(module_weights, alone))) == weights_sha256(list(map(module_weights, three)))


def test_a_file_that_does_not_fit_stops_the_run_before_its_first_step(tmp_path: Path) -> None:
    chosen = config("small_vit", f"model.weights={saved(vit(side=64), tmp_path)}")
    with pytest.raises(ConfigError, match=r"'encoder.pos_embedding' is \(1, 65, 16\) in it and \(1, 17, 16\) in this"):
        train(chosen, run_dir=tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="model.weights is for networks with a name"):
        train(chosen, network=vit(), run_dir=tmp_path / "other", quiet=True)
