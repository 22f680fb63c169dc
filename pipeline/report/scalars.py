"""A line of metrics.jsonl as named numbers, the same in every logger.

    train/loss  train/images_per_s  train/learning_rate  train/seconds  epoch        of the whole pipeline
    train/loader_images_per_s                                        what the loader could give, where it is known
    test/error_pct  test/loss  test/<metric of the task>                             in epochs with a test
    ema/error_pct  ema/loss                                                          the same with averaged weights
    module 03 loss/cascade.task      module 03 test/cascade.error_pct                of every local module
    rank 1/busy_fraction  ...                                                        of every rank
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.base.metric import ERROR

OF_RANKS = ("queue_depth", "peak_memory_bytes", "bytes_sent")
SHARES = ("busy", "wait")


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Name -> number of everything that ``record`` has measured: null, as a loss that is not finite, is left out.

    Args:
        record: a line of metrics.jsonl, as JSON reads it.
    """
    return {name: value for name, value in _entries(record) if value is not None}


def _entries(record: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield "epoch", record["epoch"]
    yield "train/loss", record["train_loss"]
    yield "train/images_per_s", record["images_per_s"]
    if record.get("loader_images_per_s") is not None:
        yield "train/loader_images_per_s", record["loader_images_per_s"]
    yield "train/learning_rate", record["learning_rate"]
    yield "train/seconds", record["wall_s"]
    yield f"test/{ERROR.name}", record["test_error_pct"]
    yield "test/loss", record["test_loss"]
    for name, value in record["test_metrics"].items():
        yield f"test/{name}", value
    for name, value in record.get("ema_metrics", {}).items():
        yield f"ema/{name}", value
    modules, ranks = record["modules"], record["stages"]
    for module in modules:
        name = f"module {module['index']:0{len(str(len(modules) - 1))}}"  # so that they sort by depth
        for loss, value in module["losses"].items():
            yield f"{name} loss/{loss}", value
        for level, value in module["head_error_pct"].items():
            yield f"{name} test/{level}.{ERROR.name}", value
        for metric, value in module["head_metrics"].items():
            yield f"{name} test/{metric}", value
        yield f"{name} train/skipped_steps", module["skipped_steps"] or None
    for rank in ranks:
        name = f"rank {rank['rank']:0{len(str(len(ranks) - 1))}}"
        for share in SHARES:
            yield f"{name}/{share}_fraction", rank[f"{share}_s"] / rank["wall_s"] if rank["wall_s"] else None
        for key in OF_RANKS:
            yield f"{name}/{key}", rank[key]
