"""Named tensors through a whole run: ids, a mask, a skip connection across edges, and lengths that vary."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_spawn import run_ranks
from tiny_sequences import LENGTHS, LONGEST, ROWS, batches, blocks, configuration, registered
from torch import nn

from pipeline import ConfigError, LoaderData, evaluate, train
from pipeline.base.config import METHODS
from pipeline.local import methods


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
    assert len({digest for digest, _ in alone.values()}) == len(CASES)
    for ranks in (2, 3):
        results = run_ranks(trained, ranks, str(tmp_path / str(ranks)), timeout_s=120)
        assert [result.exit_code for result in results] == [0] * ranks, [result.stderr for result in results]
        assert results[0].value == alone
    found = evaluate(tmp_path / "1" / "0", network=blocks(), data=LoaderData(batches(), batches(), max_length=LONGEST))
    assert found.images == ROWS * len(LENGTHS) and found.rows[-1].exit in ("final", "all")


def trained_freely(rank: int, folder: str) -> dict[str, Any]:
    """Ids, mask and skip connection in rings that are read by ranks at their own pace."""
    registered()
    data = LoaderData(batches() * 3, batches(), max_length=LONGEST)
    config = configuration(1, schedule={"kind": "free", "ring": 2})
    return train(config, network=blocks(), data=data, run_dir=Path(folder) / "run", quiet=True)


def test_named_tensors_of_any_length_travel_through_rings(tmp_path: Path) -> None:
    results = run_ranks(trained_freely, 3, str(tmp_path), timeout_s=60)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    summary = results[0].value
    first, *others = summary["ranks"]
    assert first["steps"] == 2 * 3 * len(LENGTHS) and all(rank["steps"] > 0 for rank in others)
    losses = [loss for head in summary["heads"] for loss in head["losses"].values()]
    assert len(losses) == 5 and all(map(math.isfinite, losses))
    found = evaluate(tmp_path / "run", network=blocks(), data=LoaderData(batches(), batches(), max_length=LONGEST))
    assert found.images == ROWS * len(LENGTHS)


def test_a_batch_that_is_longer_than_announced_is_refused(tmp_path: Path) -> None:
    data = LoaderData(batches(), batches(), max_length=8)
    with pytest.raises(ConfigError, match=r"gave 'x' of shape \(9,\), the longest may have \(8,\); cut them, or"):
        train(configuration(2), network=blocks(), data=data, run_dir=tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="max_length = 6, but the train loader gave batches of length 7; raise it"):
        data = LoaderData(batches(), batches(), max_length=6)
        train(configuration(2), network=blocks(), data=data, run_dir=tmp_path / "other", quiet=True)


def test_lengths_that_were_not_announced_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'x' of shape \(9,\) after 'x' of shape \(7,\); .*\(max_length\)"):
        data = LoaderData(batches(), batches())
        train(configuration(2), network=blocks(), data=data, run_dir=tmp_path / "run", quiet=True)


def test_a_local_module_that_ends_in_ids_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(OrderedDict(same=nn.Identity(), **dict(blocks().named_children())))
    with pytest.raises(ConfigError, match="a local module ends with block 'same', which gives int64 as 'x'"):
        data = LoaderData(batches(), batches(), max_length=LONGEST)
        config = configuration(2, model={"modules": 6})
        train(config, network=network, data=data, run_dir=tmp_path / "run", quiet=True)
