"""The decoder: its size, what it sees, and what is refused."""

from __future__ import annotations

import pytest
import torch

from pipeline import ConfigError, UncutModel, build_blocks
from pipeline.models.unbuilt import drawn_blocks, planned_blocks


def test_it_has_the_parameters_of_its_formula() -> None:
    layers, width, length, vocabulary = 6, 128, 64, 256
    blocks = planned_blocks("decoder", length, vocabulary)
    assert list(blocks) == ["embed", *(f"block.{index}" for index in range(layers)), "head"]
    block = 2 * 2 * width + 12 * width**2 + 9 * width
    wanted = (vocabulary + length) * width + layers * block + 2 * width + (width + 1) * vocabulary
    assert sum(p.numel() for part in blocks.values() for p in part.parameters()) == wanted
    assert list(planned_blocks("decoder/2x16x4", 8, 5)) == ["embed", "block.0", "block.1", "head"]


def test_no_place_sees_those_behind_it() -> None:
    torch.manual_seed(0)
    model = UncutModel(build_blocks("decoder/2x16x4", 8, 5))
    ids = torch.randint(5, (3, 8))
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 5
    with torch.no_grad():
        first, second = model(ids), model(other)
    assert first.shape == (3, 8, 5)
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:])
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :3]), first[:, :3])  # a shorter one


def test_weights_are_drawn_as_published_and_block_by_block() -> None:
    planned = planned_blocks("decoder/8x64x4", 32, 256)
    drawn = drawn_blocks(planned, list(planned), lambda name: len(name), lambda: planned)
    block = drawn["block.3"]
    for weight, std in ((block.attend.weight, 0.02), (block.narrow.weight, 0.02 / 4), (drawn["embed"].ids, 0.02)):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.05)
    assert not block.mix.bias.any() and drawn["head"].linear.weight.shape == (256, 64)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("decoder/small", "model.name = 'decoder/small': give LAYERSxWIDTHxHEADS, for example 'decoder/6x128x4'"),
        ("decoder/6x128x5", "5 heads do not divide a width of 128; use 'decoder/6x125x5'"),
        ("decoder/0x128x4", "give LAYERSxWIDTHxHEADS"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_blocks(name, 8, 5)


def test_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="takes sequences of ids, not images of 32 x 32; use data.name=text"):
        build_blocks("decoder", 3, 10, (32, 32))
