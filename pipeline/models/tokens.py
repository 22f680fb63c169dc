"""Tokens of an image (B, T, D), as a vision transformer has them: where they are in it, for heads and patches.

    class, registers   t0  t1  t2  t3        as a map (B, D, 2, 2), to every position of which the mean of the tokens
                       of the positions      in front is added ("readout add" of dense prediction transformers, Ranftl
                       0 1                   et al. 2021, arXiv 2103.13413, sec. 3.1): so a head sees what the class
                       2 3                   token knows, in every patch, and its gradient reaches it

Heads that are made for maps stand on the map. Those that are made for sequences get the tokens; where they work on
patches, in the order of the patches, the tokens in front with each:

    c t0 .. t15  -->  c t0 t1 t4 t5   c t2 t3 t6 t7   c t8 t9 t12 t13   c t10 t11 t14 t15
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.heads import FeatureShape, Given

MOST_IN_FRONT = 16
"""Tokens before those of the positions: of the class, of distillation, registers."""


@dataclass(frozen=True)
class TokenGrid:
    """
    Attributes:
        front: number of tokens before those of the positions.
        rows, columns: of the positions, which come row by row.
    """

    front: int
    rows: int
    columns: int

    @staticmethod
    def of(shape: FeatureShape, image_shape: tuple[int, ...]) -> TokenGrid | None:
        """That of features (T, D) of an image (C, H, W): the largest grid of squares that fits into T with at most
        MOST_IN_FRONT left over; None where there is none, or no image."""
        if len(shape) != 2 or len(image_shape) != 3:
            return None
        height, width = image_shape[1:]
        whole = math.gcd(height, width)
        for side in range(whole, 1, -1):  # positions along the common divisor of both sides
            rows, columns = side * height // whole, side * width // whole
            front = shape[0] - rows * columns
            if whole % side == 0 and 0 <= front <= min(MOST_IN_FRONT, rows * columns):
                return TokenGrid(front, rows, columns)
        return None


class Reading:
    """How the heads of a term read a feature, the tokens of a grid above all; compared by its fields."""

    def feature(self, x: Tensor) -> Tensor:
        """(B, T, D) -> what they stand on; linear in x."""
        raise NotImplementedError

    def given(self, given: Given) -> Given:
        """What goes with it."""
        return given

    def output(self, output: Tensor) -> Tensor:
        """Of a head that gives one output per token, (B, ., V) -> (B, T, V)."""
        return output

    def rows(self, output: Tensor) -> Tensor:
        """Of a head that gives one output per row of what it stands on: one per row of the feature."""
        return output


@dataclass(frozen=True)
class AsMap(Reading):
    """(B, T, D) -> (B, D, rows, columns), channels last."""

    grid: TokenGrid

    def feature(self, x: Tensor) -> Tensor:
        front, grid = self.grid.front, self.grid
        positions = x[:, front:]
        if front:
            positions = positions + x[:, :front].mean(dim=1, keepdim=True)
        found: Tensor = positions.unflatten(1, (grid.rows, grid.columns))
        return found.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class InPatches(Reading):
    """(B, T, D) -> (B, n n (front + t), D), patch by patch of t tokens; n divides rows and columns."""

    grid: TokenGrid
    n: int

    def feature(self, x: Tensor) -> Tensor:
        # Views, not an index of every token: nothing is made anew in a step, and the gradients of the tokens in front,
        # which stand in every patch, are added in one order on a GPU as well.
        front, positions = x[:, None, : self.grid.front], x[:, self.grid.front :]
        patches = positions.unflatten(1, self._sides).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return torch.cat([front.expand(-1, self.n**2, *front.shape[2:]), patches], dim=2).flatten(1, 2)

    def given(self, given: Given) -> Given:
        length = self.grid.front + self.grid.rows * self.grid.columns

        def along(x: Tensor) -> Tensor:
            return self.feature(x) if x.dim() > 1 and x.size(1) == length else x

        inputs = None if given.inputs is None else {name: along(x) for name, x in given.inputs.items()}
        return Given(along(given.target), given.image, inputs, given.step)

    def output(self, output: Tensor) -> Tensor:
        """Of the tokens in front the mean of what the patches say."""
        front, patches = self.grid.front, output.unflatten(1, (self.n**2, -1))
        rows, height, columns, width = self._sides
        positions = patches[:, :, front:].unflatten(2, (height, width)).unflatten(1, (rows, columns))
        return torch.cat([patches[:, :, :front].mean(dim=1), positions.transpose(2, 3).flatten(1, 4)], dim=1)

    @property
    def _sides(self) -> tuple[int, int, int, int]:
        """Of the grid: patches and their rows, patches and their columns."""
        grid, n = self.grid, self.n
        return n, grid.rows // n, n, grid.columns // n


def reading_of(
    shape: FeatureShape, image_shape: tuple[int, ...], grid: int, as_map: bool
) -> tuple[Reading | None, FeatureShape, int]:
    """How heads on ``grid`` x ``grid`` patches of features of ``shape`` read them, the shape that they then stand on,
    and the patches along each side of that. Nothing changes unless the features are tokens of an image.

    Args:
        shape: (T, D) of tokens.
        image_shape: (C, H, W) of the image.
        grid: patches along each side of a map.
        as_map: the heads are made for maps.
    """
    tokens = TokenGrid.of(shape, image_shape)
    if tokens is None:
        return None, shape, grid
    if as_map:
        return AsMap(tokens), (shape[1], tokens.rows, tokens.columns), grid
    if grid > 1 and tokens.rows % grid == 0 and tokens.columns % grid == 0:
        length = tokens.rows * tokens.columns + grid * grid * tokens.front
        return InPatches(tokens, grid), (length, shape[1]), grid * grid
    return None, shape, grid
