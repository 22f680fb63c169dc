"""What a classification is trained for beside whole classes: smoothed labels, shares of classes; its top-5 error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from helpers_spawn import run_ranks
from tiny import tiny_config

from pipeline import Classification, ConfigError, LoaderData, load_config, train
from pipeline.base.config import MethodConfig
from pipeline.local.methods import method_terms
from pipeline.local.optimiser import poly
from pipeline.local.task import ERROR, TOP5_ERROR, refuse_unusable
from pipeline.models.heads import Given
from pipeline.models.losses import similarity_matching

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def test_smoothed_labels_spread_a_share_over_all_classes() -> None:
    spread = 0.9 * F.one_hot(LABELS, 5) + 0.1 / 5
    wanted = -(spread * LOGITS.log_softmax(dim=1)).sum(dim=1).mean()
    task = Classification(5, (3, 8, 8), label_smoothing=0.1)
    assert task.loss(LOGITS, LABELS).allclose(wanted)
    head = task.head((7, 4, 4))
    feature = torch.randn(6, 7, 4, 4)
    logits = head.logits(feature)
    assert logits is not None and head.loss(feature, Given(LABELS)).allclose(task.loss(logits, LABELS))
    assert task.total_loss(LOGITS, LABELS).allclose(F.cross_entropy(LOGITS, LABELS, reduction="sum").double())


def test_the_classifier_of_deinforeg_smooths_too() -> None:
    found = []
    for smoothing in (0.0, 0.1):
        task = Classification(5, (3, 8, 8), label_smoothing=smoothing)
        torch.manual_seed(0)
        (term,) = method_terms(MethodConfig(name="deinforeg", feature_dim=8), task, 0.0)
        head, feature = term.make((7, 4, 4)).double(), torch.randn(6, 7, 4, 4, dtype=torch.float64)
        logits = head.logits(feature)
        assert logits is not None
        found.append(head.loss(feature, Given(LABELS)) - 0.001 * task.loss(logits, LABELS))
    assert torch.allclose(*found, rtol=0, atol=1e-12) and found[0] > 0


def test_shares_of_classes_are_a_target() -> None:
    task = Classification(5, (3, 8, 8), soft=True)
    shares = 0.7 * F.one_hot(LABELS, 5).float() + 0.3 * F.one_hot(LABELS.roll(1), 5)
    refuse_unusable(task)
    assert task.loss(LOGITS, shares).allclose(-(shares * LOGITS.log_softmax(dim=1)).sum(dim=1).mean())
    assert ERROR.count(LOGITS, shares) == ERROR.count(LOGITS, LABELS)
    whole = F.one_hot(LABELS, 5).float()
    assert task.total_loss(LOGITS, whole).allclose(task.total_loss(LOGITS, LABELS))


@pytest.mark.parametrize("groups", [1, 2])
def test_similarities_are_matched_to_those_of_the_shares(groups: int) -> None:
    feature = torch.randn(6, 4 * groups, 3, 3, generator=torch.Generator().manual_seed(1))
    whole = similarity_matching(feature, LABELS, 5, groups)
    assert similarity_matching(feature, F.one_hot(LABELS, 5).float(), 5, groups).allclose(whole, atol=1e-6)


def test_what_compares_whole_classes_refuses_shares() -> None:
    task = Classification(5, (3, 8, 8), soft=True)
    for name, words in (("infopro-contrast", "no image with one"), ("deinforeg", "remove data.mixup and data.cutmix")):
        with pytest.raises(ConfigError, match=words):
            method_terms(MethodConfig(name=name), task, 0.0)


def test_top_5_is_counted_from_100_classes_on() -> None:
    logits = torch.zeros(3, 100)
    logits[:, :6] = torch.tensor([6.0, 5, 4, 3, 2, 1])
    labels = torch.tensor([0, 4, 5])
    assert Classification(99, (3, 8, 8)).metrics == (ERROR,)
    assert Classification(100, (3, 8, 8)).metrics == (ERROR, TOP5_ERROR)
    assert [metric.of(metric.count(logits, labels), 3) for metric in (ERROR, TOP5_ERROR)] == pytest.approx(
        [200 / 3, 100 / 3]
    )


def test_keys_that_do_not_go_together_are_refused() -> None:
    for assignments, words in (
        (["data.name=shapes", "data.mixup=0.2"], "^data.mixup = 0.2 with .* and these have one for every pixel"),
        (["data.name=text", "data.cutmix=1"], "^data.cutmix = 1 .* and these have one for every byte; remove it"),
        (["data.name=cityscapes", "train.label_smoothing=0.1"], "^train.label_smoothing = 0.1 with .* for every pixel"),
        (["data.name=text", "train.label_smoothing=0.1"], "^train.label_smoothing = 0.1 with .* for every byte"),
        (["optim.schedule=poly"], "without a warm-up"),
        (["optim.schedule=poly", "optim.warmup_epochs=0", "optim.lr=1e-5"], "lower optim.min_lr"),
        (["data.test_scales=[]"], "leaves nothing to test"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(assignments=assignments)


def test_mixing_is_left_to_loaders_of_ones_own(tmp_path: Path) -> None:
    loaders = LoaderData(tiny.Batches(), tiny.Batches())
    with pytest.raises(ConfigError, match="collate_fn"):
        train(tiny_config(data={"mixup": 0.2}), network=tiny.network(), data=loaders, run_dir=tmp_path)
    with pytest.raises(ConfigError, match="soft=True"):
        task = Classification(10, (3, 32, 32))
        config = load_config(assignments=["data.cutmix=1", "log.curve=false"])
        train(config, network=tiny.network(), task=task, run_dir=tmp_path)


def test_smoothing_that_a_task_of_ones_own_does_not_have_is_refused(tmp_path: Path) -> None:
    config, loaders = tiny_config(train={"label_smoothing": 0.2}), LoaderData(tiny.Batches(), tiny.Batches())
    task = Classification(tiny.CLASSES, tiny.IMAGE, soft=True)
    with pytest.raises(ConfigError, match=r"^train.label_smoothing = 0.2 .* label_smoothing=0.2\), or leave"):
        train(config, network=tiny.network(), data=loaders, task=task, run_dir=tmp_path)


def test_poly_falls_from_the_peak_to_its_floor_in_every_step() -> None:
    optim = load_config(assignments=["optim.schedule=poly", "optim.warmup_epochs=0", "optim.lr=0.01"]).optim
    rates = [poly(optim, step, 100) for step in range(101)]
    assert rates[0] == 0.01 and rates[100] == 1e-4 and sorted(rates, reverse=True) == rates
    assert rates[50] == pytest.approx((0.01 - 1e-4) * 0.5**0.9 + 1e-4)


class Mixed(tiny.Batches):
    """Batches whose classes the user has mixed."""

    def __iter__(self) -> Any:
        for images, labels in super().__iter__():
            shares = 0.5 * (F.one_hot(labels, tiny.CLASSES) + F.one_hot(labels.roll(1), tiny.CLASSES))
            yield images, shares


def soft_run(rank: int, folder: str) -> dict[str, Any]:
    """Two epochs of two batches with micro-batches, patches and a cascade."""
    config = tiny_config(
        "dgl", "hpff", 2, 4, train={"epochs": 2, "label_smoothing": 0.1}, schedule={"micro_batches": 2},
        optim={"schedule": "poly"},
    )
    task = Classification(tiny.CLASSES, tiny.IMAGE, 0.1, soft=True)
    data = LoaderData(Mixed(), tiny.Batches())  # the test loader has whole classes
    return train(config, network=tiny.network(), data=data, task=task, run_dir=Path(folder), quiet=True)


def test_shares_travel_with_the_batch_to_every_module(tmp_path: Path) -> None:
    alone = soft_run(0, str(tmp_path / "one"))
    results = run_ranks(soft_run, 2, str(tmp_path / "two"))
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    assert results[0].value["weights_sha256"] == alone["weights_sha256"]
    assert results[0].value["test_error_pct"] == alone["test_error_pct"] is not None
    assert math.isfinite(alone["train_loss"])


