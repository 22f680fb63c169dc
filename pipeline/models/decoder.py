"""A decoder of text, as GPT-2 is built: ``model.name = "decoder"``, or ``"decoder/LAYERSxWIDTHxHEADS"``.

    embed  -->  block.0  -->  ...  -->  block.5  -->  head
    of id and place           causal attention, MLP of 4 WIDTH; LayerNorm before each; both are added to what comes in

``decoder`` has 6 layers of width 128 with 4 heads. Sequences are as long as the data's; every place sees itself and
those before it. Weights of matrices begin as N(0, 0.02), those that are added to the residual stream as N(0, 0.02 /
sqrt(2 LAYERS)) (Radford et al. 2019, sec. 2.3).
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.base.errors import ConfigError, shown
from pipeline.models.backbones import Blocks, Sides, SizedFunction, register_library, register_sized

NAME = "decoder"
_SIZE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,4})x([1-9]\d{0,3})")
_DEFAULT = "6x128x4"
_STD = 0.02


class Embedding(nn.Module):
    """Ids int64 (B, t) -> (B, t, D), t up to the length."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.ids = nn.Parameter(torch.empty(vocabulary, width))
        self.places = nn.Parameter(torch.empty(length, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.ids, std=_STD)
        nn.init.normal_(self.places, std=_STD)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.ids) + self.places[: x.size(1)]


class _Linear(nn.Linear):
    """A linear layer drawn from N(0, std), its bias 0."""

    def __init__(self, inputs: int, outputs: int, std: float = _STD) -> None:
        self._std = std
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self._std)
        nn.init.zeros_(self.bias)


class DecoderBlock(nn.Module):
    """(B, T, D) -> (B, T, D): causal self-attention and an MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        added = _STD / math.sqrt(2 * layers)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.mix = _Linear(width, 3 * width), _Linear(width, width, added)
        self.widen, self.narrow = _Linear(width, 4 * width), _Linear(4 * width, width, added)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attend(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind()
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.narrow(F.gelu(self.widen(self.norm2(x))))
        return mixed


def decoder(size: str) -> SizedFunction:
    """The function that builds a decoder of ``LAYERSxWIDTHxHEADS``.

    Raises:
        ConfigError: that is no such size, or the heads do not divide the width.
    """
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ConfigError(
            f"model.name = {shown(f'{NAME}/{size}')}: give LAYERSxWIDTHxHEADS, for example '{NAME}/{_DEFAULT}'"
        )
    layers, width, heads = map(int, match.groups())
    if width % heads:
        raise ConfigError(
            f"model.name = '{NAME}/{size}': {heads} heads do not divide a width of {width}; use "
            f"'{NAME}/{layers}x{width - width % heads or heads}x{heads}'"
        )

    def build(length: int, vocabulary: int, sides: Sides | None) -> Blocks:
        if sides:
            raise ConfigError(
                f"model.name = '{NAME}' takes sequences of ids, not images of {' x '.join(map(str, sides))}; use "
                "data.name=text, or another network"
            )
        blocks: Blocks = OrderedDict(embed=Embedding(vocabulary, length, width))
        for index in range(layers):
            blocks[f"block.{index}"] = DecoderBlock(width, heads, layers)
        blocks["head"] = nn.Sequential(OrderedDict(norm=nn.LayerNorm(width), linear=_Linear(width, vocabulary)))
        return blocks

    return build


register_sized(NAME, decoder(_DEFAULT))
register_library(NAME, decoder)
