"""What blocks give, found without computing anything: names, shapes, dtypes, axes that vary; and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_shapes import RealTensors
from tiny_sequences import LONGEST, blocks
from torch import Tensor, nn

from pipeline.base.errors import ConfigError
from pipeline.base.flow import TensorSpec
from pipeline.models.boundaries import boundary_specs

IDS = {
    "x": TensorSpec((LONGEST,), torch.int64, varies=(0,)),
    "mask": TensorSpec((LONGEST,), torch.bool, varies=(0,)),
}


class Does(nn.Module):
    """A block of one function, with a weight."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, flow: Any) -> Any:
        return self.function(flow)


def test_named_tensors_of_a_users_network_are_found_without_computing_or_changing_it() -> None:
    network = blocks().train()
    before = {name: (value.data_ptr(), value._version) for name, value in network.state_dict(keep_vars=True).items()}
    with RealTensors() as real:
        specs = boundary_specs(OrderedDict(network.named_children()), IDS)
    assert not real.found
    assert before == {n: (v.data_ptr(), v._version) for n, v in network.state_dict(keep_vars=True).items()}
    assert all(module.training for module in network.modules())
    feature, mask = TensorSpec((LONGEST, 6), torch.float32, (0,)), IDS["mask"]
    assert specs["embed"] == {"x": feature, "mask": mask}
    assert specs["again"] == {"x": feature, "mask": mask, "skip": feature}
    assert specs["pool"] == {"x": TensorSpec((3,))}


@pytest.mark.parametrize("longest", [8, 9])
def test_an_axis_varies_although_the_next_shorter_batch_gives_the_same_shape(longest: int) -> None:
    network = OrderedDict(
        pool=Does(lambda x: x[:, : x.size(1) // 2 * 2].unflatten(1, (-1, 2)).mean(2)),
        pairs=Does(lambda x: {"x": x, "pairs": x @ x.transpose(1, 2)}),
        mean=Does(lambda flow: flow["x"].mean(1)),
    )
    specs = boundary_specs(network, {"x": TensorSpec((longest, 3), varies=(0,))})
    assert specs["pool"] == {"x": TensorSpec((4, 3), varies=(0,))}
    assert specs["pairs"]["pairs"] == TensorSpec((4, 4), varies=(0, 1))
    assert specs["mean"] == {"x": TensorSpec((3,))}


def test_images_need_not_be_square() -> None:
    network = OrderedDict(a=nn.Conv2d(3, 4, 3, 2, 1), b=nn.Conv2d(4, 5, 3, 2, 1))
    specs = boundary_specs(network, {"x": TensorSpec((3, 12, 40))})
    assert [specs[name]["x"].shape for name in "ab"] == [(4, 6, 20), (5, 3, 10)]


def test_batch_norm_gives_what_it_is_given_if_it_fits_and_no_view_of_it() -> None:
    image = {"x": TensorSpec((3, 8, 8))}
    fitting = OrderedDict(a=nn.Identity(), b=nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True)))
    assert boundary_specs(fitting, image, entrances=["b"])["b"] == image
    with pytest.raises(ConfigError, match=r"^block 'b' fails on an input of shape \(3, 8, 8\)"):
        boundary_specs(OrderedDict(a=nn.Identity(), b=nn.BatchNorm2d(4)), image)


def test_a_block_that_looks_at_values_runs_for_real() -> None:
    def peeks(x: Tensor) -> Tensor:
        assert float(x.sum()) == 0.0
        return x[:, : 2 + int(x.max())]

    network = OrderedDict(first=nn.Linear(4, 4, bias=False), peeks=Does(peeks), last=nn.Linear(2, 3))
    specs = boundary_specs(network, {"x": TensorSpec((4,))})
    assert {name: tensors["x"].shape for name, tensors in specs.items()} == {"first": (4,), "peeks": (2,), "last": (3,)}
    with torch.device("meta"):  # planned: its weights are not there yet
        planned = OrderedDict(first=nn.Linear(4, 4), peeks=Does(peeks), last=nn.Linear(2, 3))
    assert boundary_specs(planned, {"x": TensorSpec((4,))}) == specs
    assert all(parameter.is_meta for block in planned.values() for parameter in block.parameters())


def test_a_dict_of_x_alone_is_x() -> None:
    network = OrderedDict(a=Does(lambda x: {"x": x}), b=nn.Linear(4, 2))
    assert boundary_specs(network, {"x": TensorSpec((4,))})["b"] == {"x": TensorSpec((2,))}


ACCEPTED = "; a block gives one tensor, or a dict of named tensors with 'x' among them, each with a row per sample"
REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tuple": (lambda x: (x, x), "a tuple of 2" + ACCEPTED),
    "nothing": (lambda x: None, "None" + ACCEPTED),
    "no x": (lambda x: {"y": x, "mask": x}, "a dict of y, mask" + ACCEPTED),
    "empty": (lambda x: {}, "a dict of nothing" + ACCEPTED),
    "a number beside it": (lambda x: {"x": x, "loss": 3.0}, "a float as 'loss'" + ACCEPTED),
    "0-d": (lambda x: x.mean(), "'x' of no axis for 2 samples" + ACCEPTED),
    "0-d beside it": (lambda x: {"x": x, "scale": x.mean()}, "'scale' of no axis for 2 samples" + ACCEPTED),
    "no row per sample": (lambda x: {"x": x, "table": x.T}, "'table' of shape (4, 2) for 2 samples" + ACCEPTED),
    "a key that is no name": (lambda x: {"x": x, "a.b": x}, f"a tensor named 'a.b'{ACCEPTED}, named by identifiers"),
    "a key that is no text": (lambda x: {"x": x, 3: x}, f"a tensor named 3{ACCEPTED}, named by identifiers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_block_that_gives_something_else_is_named(case: str) -> None:
    gives, what = REFUSED[case]
    network = OrderedDict(first=nn.Linear(4, 4), odd=Does(gives), last=nn.Linear(4, 2))
    with pytest.raises(ConfigError) as caught:
        boundary_specs(network, {"x": TensorSpec((4,))})
    assert str(caught.value) == f"block 'odd' gives {what}"


def test_a_block_must_give_the_same_names_at_every_length() -> None:
    network = OrderedDict(odd=Does(lambda x: {"x": x, "late": x} if x.size(1) == 8 else x))
    with pytest.raises(ConfigError, match=r"block 'odd' gives x \(8,\) \+ late \(8,\) for the longest batch and x"):
        boundary_specs(network, {"x": TensorSpec((8,), varies=(0,))})


class Last(nn.Module):
    """(B, C, H, W) -> (B, H, W, C); of images with ``side`` rows only, where that is given."""

    def __init__(self, side: int | None = None) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        if self.side not in (None, x.size(2)):
            raise ValueError("another size")
        return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("image", "side", "shape"),
    [((8, 8, 8), None, (8, 8, 8)), ((3, 8, 3), None, (8, 3, 3)), ((3, 8, 9), 8, (8, 9, 3)), ((3, 8, 8), 8, (8, 8, 3))],
)
def test_maps_with_their_channels_last_are_seen_as_such(
    image: tuple[int, ...], side: int | None, shape: tuple[int, ...]
) -> None:
    network = OrderedDict(same=nn.Identity(), turn=Last(side), back=nn.Flatten())
    specs = boundary_specs(network, {"x": TensorSpec(image)})
    assert not specs["same"]["x"].channels_last and not specs["back"]["x"].channels_last
    assert specs["turn"]["x"] == TensorSpec(shape, channels_last=True)
    assert specs["turn"]["x"].feature == image
