"""Images and features need not be square: every method, head and patch, and the runs of several ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from oracle.literal import literal_backward
from oracle.test_gradients import assert_same
from tiny import METHODS, STEPS, Batches, gradients, network, tiny_batch, tiny_config, tiny_stage, train_on
from tiny import without_updates as kept

from pipeline import LoaderData, train
from pipeline.models.heads import dgl_head

WIDE, TALL = (3, 8, 12), (3, 12, 8)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_the_literal_definition(method: str) -> None:
    stage, modules, plan = tiny_stage(tiny_config(method, "plain", 2), torch.float64, WIDE)
    assert [plan.feature(index) for index in (0, 2, 4)] == [(4, 8, 12), (6, 4, 6), (4,)]
    reference = copy.deepcopy(modules)
    batch = tiny_batch(dtype=torch.float64, image_shape=WIDE)
    train_on(kept(stage), 0, 0, batch)
    literal_backward(reference, plan.config, batch.x, batch.labels, batch.image)
    assert_same(gradients(modules), gradients(reference))


@pytest.mark.parametrize("image", [WIDE, TALL])
@pytest.mark.parametrize("method", METHODS)
def test_patches_of_both_orientations_train_every_head(method: str, image: tuple[int, ...]) -> None:
    stage, modules, _ = tiny_stage(tiny_config(method, "hpff", 2), image=image)
    train_on(kept(stage), 0, 0, tiny_batch(image_shape=image))
    found = gradients(modules)
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in found.values())


def test_the_head_of_dgl_pools_each_side_by_four() -> None:
    pool = dgl_head((4, 8, 32), 10, "mlp")[0]
    assert pool(torch.randn(2, 4, 8, 32)).shape == (2, 4, 2, 8)


class Wide(Batches):
    """STEPS batches of images that are wider than high."""

    def __iter__(self) -> Iterator[Any]:
        for step in range(STEPS):
            batch = tiny_batch(step, image_shape=WIDE)
            yield batch.image, batch.labels


def trained(rank: int, folder: str) -> str:
    config = tiny_config("infopro", "hpff", 2, train={"epochs": 1})
    summary = train(config, network=network(), data=LoaderData(Wide(), Wide()), run_dir=Path(folder), quiet=True)
    return str(summary["weights_sha256"])


def test_two_ranks_train_on_images_that_are_not_square(tmp_path: Path) -> None:
    results = run_ranks(trained, 2, str(tmp_path / "2"), timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    assert results[0].value == trained(0, str(tmp_path / "1"))
