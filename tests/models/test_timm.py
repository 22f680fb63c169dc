"""timm's networks by name: in blocks, with its names and its own weights, or refused in one line."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers_shapes import boundary_shapes
from torch import Tensor

from pipeline import ConfigError, UncutModel, build_blocks
from pipeline.models.unbuilt import planned_blocks


@pytest.fixture(scope="module")
def timm() -> Any:
    return pytest.importorskip("timm")  # its import takes seconds


def logits(model: torch.nn.Module, image: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, *image, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("name", "parameters", "blocks"),
    [("vit_small_patch16_224", 22_050_664, 12), ("deit_tiny_patch16_224", 5_717_416, 12)],
)
@pytest.mark.usefixtures("timm")
def test_a_network_is_as_large_as_published_and_cut_at_its_blocks(name: str, parameters: int, blocks: int) -> None:
    found = planned_blocks(f"timm/{name}", 3, 1000)
    assert sum(parameter.numel() for block in found.values() for parameter in block.parameters()) == parameters
    assert list(found) == ["patch_embed", *(f"blocks.{index}" for index in range(blocks)), "head"]


@pytest.mark.parametrize("name", ["test_vit3", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("channels", [1, 3])
def test_timm_and_we_compute_the_same_with_the_same_weights_in_both_directions(
    timm: Any, name: str, channels: int
) -> None:
    options = {"img_size": (64, 64)} if name == "test_vit3" else {}
    theirs = timm.create_model(name, num_classes=7, in_chans=channels, **options)
    ours = UncutModel(build_blocks(f"timm/{name}", channels, 7, (64, 64)))
    image = (channels, 64, 64)
    assert not torch.equal(logits(ours, image), logits(theirs, image))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(logits(ours, image), logits(theirs, image))
    other = timm.create_model(name, num_classes=7, in_chans=channels, **options)
    ours.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(logits(ours, image), logits(other, image))


@pytest.mark.usefixtures("timm")
def test_images_of_another_size_make_another_network_only_where_it_has_one_size() -> None:
    assert boundary_shapes(planned_blocks("timm/test_vit3", 3, 7, sides=(32, 64)), (3, 32, 64))["head"] == (7,)
    assert boundary_shapes(planned_blocks("timm/test_resnet", 3, 7, sides=(32, 64)), (3, 32, 64))


@pytest.mark.usefixtures("timm")
def test_what_timm_has_not_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'timm/vit_small_patch16_224'?"):
        build_blocks("timm/vit_smal_patch16_224", 3, 10)
    with pytest.raises(ConfigError, match=r"no network of this name; timm.list_models\(\) has the names"):
        build_blocks("timm/%%%%", 3, 10)
    with pytest.raises(ConfigError, match="no_such_tag.*; leave the tag out"):
        build_blocks("timm/test_vit3.no_such_tag", 3, 10)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"needs timm, which cannot be .*; run: pip install localpipe\[timm\]"):
        build_blocks("timm/test_vit3", 3, 10)
