"""Named tensors through a whole run: ids, a mask beside them, a skip connection that crosses edges, lengths that vary.

    ids (B, T) --> embed --> x (B, T, D), mask --> mix --> x, mask, skip --> mix --> pool --> logits
                               length                          |                      ^
                                                               +----------------------+
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from torch import Tensor, nn

from pipeline import AuxiliaryHead, Config, ConfigError, LoaderData, Term, evaluate, from_dict, register_method, train
from pipeline.base.config import METHODS
from pipeline.local import methods

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
    """Attention under the mask; what it was given in training or testing goes on as "skip" where ``opens``."""

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

    def loss(self, feature: Tensor, labels: Tensor, image: Tensor | None) -> Tensor:
        return nn.functional.cross_entropy(self.logits(feature), labels)

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
        "data": {"batch_size": ROWS},
        "optim": {"warmup_epochs": 0, "schedule": "constant", "lr": 0.05},
        "train": {"epochs": 2},
        "precision": {"compute": "fp32"},
        "runtime": {"device": "cpu", "threads": 1, "deadline_s": 30.0},
        "checkpoint": {"every_epochs": 1},
    }
    for section, entries in sections.items():
        values.setdefault(section, {}).update(entries)
    return from_dict(values)


def registered() -> None:
    if "pooled" not in METHODS:
        register_method("pooled", lambda config, task, position: [Term("task", 1.0, lambda s: PooledHead(s[-1]))])


@pytest.fixture(autouse=True)
def method() -> Iterator[None]:
    registered()
    yield
    METHODS.remove("pooled")
    methods._REGISTERED.pop("pooled")


CASES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "k=2": (2, {}),
    "k=K": (5, {}),
    "k=2, two micro-batches": (2, {"schedule": {"micro_batches": 2}}),
    "k=2, async": (2, {"schedule": {"kind": "async"}}),
    "k=3, measured": (3, {"partition": {"kind": "measured", "warmup": 1, "steps": 1}}),
}


def trained(rank: int, folder: str) -> dict[str, tuple[str, int]]:
    """Digest of the weights, and steps, of every case on these ranks."""
    registered()
    found = {}
    for number, (name, (span, sections)) in enumerate(CASES.items()):
        data = LoaderData(batches(), batches(), max_length=LONGEST)
        config = configuration(span, **sections)
        summary = train(config, network=blocks(), data=data, run_dir=Path(folder) / str(number), quiet=True)
        found[name] = summary["weights_sha256"], summary["steps"]
    return found


def test_the_same_weights_on_one_two_and_three_ranks(tmp_path: Path) -> None:
    alone = trained(0, str(tmp_path / "1"))
    assert {steps for _, steps in alone.values()} == {2 * len(LENGTHS)}
    assert len({digest for digest, _ in alone.values()}) == len(CASES) - 0
    for ranks in (2, 3):
        results = run_ranks(trained, ranks, str(tmp_path / str(ranks)), timeout_s=120)
        assert [result.exit_code for result in results] == [0] * ranks, [result.stderr for result in results]
        assert results[0].value == alone
    found = evaluate(tmp_path / "1" / "0", network=blocks(), data=LoaderData(batches(), batches(), max_length=LONGEST))
    assert found.images == ROWS * len(LENGTHS) and found.rows[-1].exit in ("final", "all")


def test_a_batch_that_is_longer_than_announced_is_refused(tmp_path: Path) -> None:
    data = LoaderData(batches(), batches(), max_length=8)
    with pytest.raises(ConfigError, match=r"gave 'x' of shape \(9,\), the longest may have \(8,\); cut them, or announ"):
        train(configuration(2), network=blocks(), data=data, run_dir=tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="max_length = 6, but the train loader gave batches of length 7; raise it"):
        data = LoaderData(batches(), batches(), max_length=6)
        train(configuration(2), network=blocks(), data=data, run_dir=tmp_path / "other", quiet=True)


def test_lengths_that_were_not_announced_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'x' of shape \(9,\) after 'x' of shape \(7,\); .*\(max_length\)"):
        data = LoaderData(batches(), batches())
        train(configuration(2), network=blocks(), data=data, run_dir=tmp_path / "run", quiet=True)
