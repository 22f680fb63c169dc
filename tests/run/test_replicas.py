"""Replicas x stages: 2 x 2 trains as 1 x 2 and 4 x 1 do, on the same batches, and saves once for all."""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from tiny import CLASSES, tiny_config
from torch import Tensor, nn

from pipeline import LoaderData, train

ROWS = 12


class Block(nn.Module):
    """A convolution and GroupNorm, which sees one image at a time, with a shortcut where that fits."""

    def __init__(self, given: int, width: int, stride: int = 1, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(given, width, 3, stride, 1)
        self.norm = nn.GroupNorm(2, width) if norm is None else norm(width)
        self.shortcut = (given, 1) == (width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.conv(x)))
        return x + y if self.shortcut else y


def network(norm: type[nn.Module] | None = None, seed: int = 7) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            stem=Block(3, 4, 1, norm), a=Block(4, 4, 1, norm), b=Block(4, 6, 2, norm), c=Block(6, 6, 1, norm),
            classifier=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
        )
    )  # fmt: skip


class Images:
    """Batches of noise in another order in every epoch, the last one short; what was read is noted."""

    batch_size = ROWS

    def __init__(self, rows: tuple[int, ...] = (12, 12, 9)) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Any:
        for number in torch.randperm(len(self._rows)).tolist():
            generator = torch.Generator().manual_seed(number)
            rows = self._rows[number]
            images = torch.rand(rows, 3, 8, 8, generator=generator)
            yield images, torch.randint(CLASSES, (rows,), generator=generator)


def run(
    folder: Path, replicas: int, norm: type[nn.Module] | None = None, seed: int = 7, **sections: Any
) -> dict[str, Any]:
    """A short run on this rank, and its summary."""
    sections["parallel"] = {"replicas": replicas, **sections.get("parallel", {})}
    sections.setdefault("train", {"epochs": 2})
    config = tiny_config("greedy", "plain", 2, 4, data={"batch_size": ROWS}, **sections)
    data = LoaderData(Images(), Images((5, 12, 3)))
    with contextlib.redirect_stdout(io.StringIO()):
        return train(config, network=network(norm, seed), data=data, run_dir=folder, quiet=True)


FOUR = {"2 x 2": 2, "4 x 1": 4, "1 x 4": 1}


def on_four(rank: int, folder: str) -> None:
    for name, replicas in FOUR.items():
        run(Path(folder) / name, replicas, seed=7 + rank // (4 // replicas))  # the first replica's weights count


def on_two(rank: int, folder: str) -> None:
    for name, replicas in {"1 x 2": 1, "2 x 1": 2}.items():
        run(Path(folder) / name, replicas)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    for function, ranks in ((on_four, 4), (on_two, 2)):
        results = run_ranks(function, ranks, str(folder), timeout_s=90)
        assert [result.exit_code for result in results] == [0] * ranks, [result.stderr for result in results]
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "model.pt", weights_only=True) | torch.load(folder / "heads.pt", weights_only=True)


@pytest.mark.parametrize("name", ["2 x 2", "4 x 1", "2 x 1"])
def test_replicas_end_with_the_weights_of_one_pipeline_on_the_same_batches(runs: Path, name: str) -> None:
    expected, found = weights(runs / "1 x 2"), weights(runs / name)
    begun = network().state_dict()
    assert not torch.allclose(expected["a.conv.weight"], begun["a.conv.weight"], atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
