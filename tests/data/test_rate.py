"""What a loader could give is measured beside what is taken from it, and shown with it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import tiny_config

from pipeline import LoaderData, read_metrics, train
from pipeline.base.numerics import Numerics
from pipeline.base.validation import from_dict
from pipeline.data.image_source import ImageSource
from pipeline.data.rate import LoaderRate
from pipeline.run.telemetry import _all_of
from pipeline.store.records import EpochProgress, progress_parts


def test_a_rate_is_that_of_the_epoch_at_work() -> None:
    rate = LoaderRate()
    assert rate.images_per_s is None
    rate.add(10, 2.0)
    rate.add(20, 3.0)
    assert rate.images_per_s == 6.0
    rate.begin()
    rate.add(10, 1.0)
    assert rate.images_per_s == 10.0


def test_a_data_set_by_name_says_what_it_could_give() -> None:
    values: dict[str, Any] = {"data": {"name": "digits", "batch_size": 32}}
    source = ImageSource(from_dict(values), Numerics(torch.device("cpu"), torch.float32, False))
    batches: Any = source.train(1)
    with closing(batches):
        next(batches)
    assert source.rate.images_per_s is not None and source.rate.images_per_s > 0


def test_it_stands_in_the_line_beside_what_is_trained() -> None:
    progress = EpochProgress(1, 2, 3, 10, 499.0, 5.0, "train", ())
    assert progress_parts(progress)[2] == "  499 img/s"
    known = EpochProgress(1, 2, 3, 10, 499.0, 5.0, "train", (), 1900.0)
    assert progress_parts(known)[2] == "  499 img/s of 1,900"
    slow = EpochProgress(1, 2, 3, 10, 0.0138, 5.0, "train", (), 3.21)
    assert progress_parts(slow)[2] == "0.014 img/s of 3.2"


def test_replicas_add_up_where_all_are_known() -> None:
    assert _all_of([2.0, 3.0]) == pytest.approx(5.0) and _all_of([2.0, None]) is None


def test_a_run_records_it_of_loaders_without_workers(tmp_path: Path) -> None:
    data = LoaderData(tiny.Batches(), tiny.Batches())
    config = tiny_config(train={"epochs": 1})
    summary = train(config, network=tiny.network(), data=data, run_dir=tmp_path / "run", quiet=True)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(record["loader_images_per_s"] > 0 for record in records)
    assert summary["loader_images_per_s"] == records[-1]["loader_images_per_s"]
