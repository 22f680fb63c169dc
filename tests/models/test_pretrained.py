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
from pipeline.models.torchvision import DEEPLAB, DEEPLAB_C
from pipeline.models.unbuilt import planned_blocks, without_weights


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


def resnet101(path: Path, **changes: Tensor | None) -> str:
    """A file of torchvision's ResNet-101, every tensor of one value, which takes no room; ``None``: left out."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in models.resnet101().state_dict().items()}
    state: dict[str, Tensor | None] = {
        key: torch.tensor(float(number)).expand(shape) for number, (key, shape) in enumerate(shapes.items())
    }
    state |= {name.replace("__", "."): value for name, value in changes.items()}
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return str(path)


def test_a_deeplab_begins_with_the_weights_of_its_resnet_and_draws_its_own_heads(tmp_path: Path) -> None:
    path, planned = resnet101(tmp_path / "resnet101.pth"), planned_blocks(DEEPLAB, 3, 19)
    weights = PretrainedWeights(path, DEEPLAB, planned, 19)
    assert weights.of_backbone and str(weights) == (
        f"begins with the backbone of {path}; drawn anew: classifier, aux_classifier; not used: fc.weight, fc.bias"
    )
    blocks = Blocks((name, without_weights(planned[name], "cpu")) for name in ("stem", "layer4.2", "classifier"))
    for value in blocks["classifier"].state_dict().values():
        value.fill_(7)
    weights.load_into(blocks)
    file = torch.load(path)
    assert torch.equal(blocks["stem"].state_dict()["conv1.weight"], file["conv1.weight"])
    assert torch.equal(blocks["layer4.2"].state_dict()["bn3.running_var"], file["layer4.2.bn3.running_var"])
    assert all(bool((value == 7).all()) for value in blocks["classifier"].state_dict().values())


@pytest.mark.parametrize(
    ("backbone", "changes", "why"),
    [
        (DEEPLAB, {"layer3__7__conv2__weight": None}, "'layer3.7.conv2.weight' is missing in it"),
        (DEEPLAB, {"layer5__0__conv1__weight": torch.zeros(1)}, "this network has no 'layer5.0.conv1.weight'"),
        (DEEPLAB, {"bn1__weight": torch.zeros(32)}, r"'bn1.weight' is \(32,\) in it and \(64,\) in this network"),
        (DEEPLAB, {"classifier__4__bias": torch.zeros(19)}, "'backbone.conv1.weight' is missing in it"),
        (DEEPLAB_C, {}, "'conv1.0.weight' is missing in it"),
    ],
)
def test_a_file_of_another_resnet_is_refused(
    backbone: str, changes: dict[str, Tensor | None], why: str, tmp_path: Path
) -> None:
    path = resnet101(tmp_path / "other.pth", **changes)
    with pytest.raises(ConfigError, match=f"does not fit {backbone} on these images: {why}"):
        PretrainedWeights(path, backbone, planned_blocks(backbone, 3, 19), 19)


def test_a_whole_file_of_torchvisions_deeplab_goes_into_ours(tmp_path: Path) -> None:
    """Of other classes: both last layers are drawn anew."""
    with torch.device("meta"):
        theirs = models.segmentation.deeplabv3_resnet101(weights_backbone=None, num_classes=21, aux_loss=True)
    path = str(tmp_path / "deeplab.pth")
    torch.save({key: torch.tensor(1.0).expand(value.shape) for key, value in theirs.state_dict().items()}, path)
    weights = PretrainedWeights(path, DEEPLAB, planned_blocks(DEEPLAB, 3, 19), 19)
    last = [f"{head}.4.{part}" for head in ("classifier", "aux_classifier") for part in ("weight", "bias")]
    assert not weights.of_backbone and weights.drawn == tuple(last)
