"""Weights to begin with: files of torchvision's and of ours, a classifier of other classes, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from pipeline import ConfigError, UncutModel, build_blocks
from pipeline.models.backbones import Blocks
from pipeline.models.pretrained import PretrainedWeights, sha256_of
from pipeline.models.unbuilt import planned_blocks


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(4)
    return models.resnet18(num_classes=10)


@pytest.fixture(scope="module")
def file(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    return str(path)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


def loaded(path: str, classes: int = 10) -> tuple[Blocks, PretrainedWeights]:
    """What a rank does: the file is checked against planned blocks, and goes into real ones."""
    weights = PretrainedWeights(path, "resnet18", planned_blocks("resnet18", 3, classes), classes)
    blocks = build_blocks("resnet18", 3, classes)
    weights.load_into(blocks)
    return blocks, weights


def test_weights_of_torchvision_give_its_logits(theirs: nn.Module, file: str, tmp_path: Path) -> None:
    blocks, weights = loaded(file)
    assert torch.equal(logits(UncutModel(blocks)), logits(theirs)) and weights.drawn == ()
    ours = tmp_path / "model.safetensors"
    save_file(UncutModel(blocks).state_dict(), ours)  # with our names of the two ends
    assert torch.equal(logits(UncutModel(loaded(str(ours))[0])), logits(theirs))


def test_files_of_before_batches_were_counted_fit(theirs: nn.Module, tmp_path: Path) -> None:
    old = {name: value for name, value in theirs.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(old, tmp_path / "old.pth")
    assert torch.equal(logits(UncutModel(loaded(str(tmp_path / "old.pth"))[0])), logits(theirs))


def test_a_classifier_of_other_classes_stays_as_it_is_drawn(theirs: nn.Module, file: str) -> None:
    blocks, weights = loaded(file, classes=5)
    assert weights.drawn == ("fc.weight", "fc.bias")
    assert str(weights) == f"begins with the weights of {file}; drawn anew for these classes: fc.weight, fc.bias"
    assert torch.equal(blocks["layer4.1"].state_dict()["conv2.weight"], theirs.state_dict()["layer4.1.conv2.weight"])
    classifier = blocks["classifier"]
    before = classifier.get_submodule("fc").weight.clone()
    weights.load_into(blocks)
    assert torch.equal(before, classifier.get_submodule("fc").weight)


def test_a_file_that_does_not_fit_is_refused_in_one_line(theirs: nn.Module, file: str, tmp_path: Path) -> None:
    def refusal(path: str, name: str = "resnet18") -> str:
        with pytest.raises(ConfigError) as error:
            PretrainedWeights(path, name, planned_blocks(name, 3, 10), 10)
        assert "\n" not in str(error.value) and str(error.value).startswith(f"model.weights = '{path}' ")
        return str(error.value)

    assert "fit resnet34 on these images: 'layer1.2.conv1.weight' is missing in it" in refusal(file, "resnet34")
    assert "'layer1.0.conv1.weight' is (64, 64, 3, 3) in it and (64, 64, 1, 1)" in refusal(file, "resnet50")
    more = str(tmp_path / "more.pth")
    torch.save({**theirs.state_dict(), "head.bias": torch.zeros(2)}, more)
    assert "this network has no 'head.bias'; give a state dict of this network" in refusal(more)
    nested, rubbish = tmp_path / "nested.pth", tmp_path / "rubbish.safetensors"
    torch.save({"model": theirs.state_dict()}, nested)
    rubbish.write_bytes(b"no such thing")
    assert "it holds something else than a flat dict of tensors" in refusal(str(nested))
    assert "cannot be read (" in refusal(str(rubbish))
    missing = str(tmp_path / "missing.pth")
    assert "cannot be read (No such file or directory)" in refusal(missing)
    with pytest.raises(ConfigError, match="cannot be read"):
        sha256_of(missing)
