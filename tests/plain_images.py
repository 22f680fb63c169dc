"""A data set for workers that are started anew: they import this file and nothing else of the tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset


class PlainImages(Dataset[tuple[Tensor, Tensor]]):
    """Forty images (3, 8, 8) of one grey each."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((3, 8, 8), 6 * index, dtype=torch.uint8), torch.tensor(index % 4)
