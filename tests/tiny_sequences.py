"""A tiny network on sequences: ids, a mask beside them, a skip connection that crosses edges, lengths that vary.

    ids (B, T) --> embed --> x (B, T, D), mask --> mix --> x, mask, skip --> mix --> pool --> logits
                                                            |                          ^
                                                            +--------------------------+
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import AuxiliaryHead, Config, Given, Term, from_dict, register_method
from pipeline.base.config import METHODS

WORDS, WIDTH, CLASSES, LONGEST, ROWS = 11, 6, 3, 9, 8
LENGTHS = (7, 9, 2, 5)


class Embed(nn.Module):
    """Ids and a mask -> features and the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)

    def forward(self, flow: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": self.table(flow["x"]), "mask": flow["mask"]}


class Mix(nn.Module):
    """Attention under the mask; what it was given goes on as "skip" too where ``opens``."""

    def __init__(self, opens: bool = False) -> None:
        super().__init__()
        self.opens = opens
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, flow: dict[str, Tensor]) -> dict[str, Tensor]:
        x, mask = flow["x"], flow["mask"]
        scores = (x @ x.transpose(1, 2)).masked_fill(~mask[:, None], -1e9)
        mixed = torch.tanh(self.inner(scores.softmax(dim=2) @ x))
        return {**flow, "x": mixed, **({"skip": x} if self.opens else {})}


class Pool(nn.Module):
    """The mean over what the mask shows of "x" and "skip", and class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(WIDTH, CLASSES)

    def forward(self, flow: dict[str, Tensor]) -> Tensor:
        shown = flow["mask"].to(flow["x"].dtype)[:, :, None]
        return self.outer(((flow["x"] + flow["skip"]) * shown).sum(1) / shown.sum(1))


class PooledHead(AuxiliaryHead):
    """Features (B, T, D) -> class scores of their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        return nn.functional.cross_entropy(self.logits(feature), given.target)

    def logits(self, feature: Tensor) -> Tensor:
        return self.linear(feature.mean(dim=1))


def blocks() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        OrderedDict(embed=Embed(), open=Mix(opens=True), mix=Mix(), again=Mix(), pool=Pool())
    )


def batches() -> list[tuple[dict[str, Tensor], Tensor]]:
    """One of each of LENGTHS; a third of every row is hidden."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids = torch.randint(WORDS, (ROWS, length), generator=generator)
        mask = torch.rand(ROWS, length, generator=generator) > 0.3
        mask[:, 0] = True
        made.append(({"x": ids, "mask": mask}, torch.randint(CLASSES, (ROWS,), generator=generator)))
    return made


def configuration(span: int, **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "model": {"modules": 5},
        "method": {"name": "pooled"},
        "hierarchy": {"cascade_span": span, **({"final_loss": "cascade"} if span > 1 else {})},
        "patches": {"grid": 1},
        "partition": {"kind": "count"},
        "data": {"batch_size": ROWS},
        "optim": {"warmup_epochs": 0, "schedule": "constant", "lr": 0.05},
        "train": {"epochs": 2},
        "precision": {"compute": "fp32"},
        "runtime": {"device": "cpu", "threads": 1, "deadline_s": 30.0},
        "checkpoint": {"every_epochs": 1},
        "log": {"curve": False},
    }
    for section, entries in sections.items():
        values.setdefault(section, {}).update(entries)
    return from_dict(values)


def registered() -> None:
    if "pooled" not in METHODS:
        register_method("pooled", lambda config, task, position: [Term("task", 1.0, lambda s: PooledHead(s[-1]))])
