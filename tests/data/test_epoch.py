"""The batches of an epoch: a short one is kept where every part of it has what a step needs."""

from __future__ import annotations

import pytest

from pipeline.base.data_config import DataConfig
from pipeline.base.errors import ConfigError
from pipeline.data.epoch import Epoch
from pipeline.data.share import WHOLE, Share


@pytest.mark.parametrize(
    ("count", "batch_size", "least", "drop_last", "batches", "samples", "short"),
    [
        (10, 4, 2, False, 3, 10, 2),
        (10, 4, 2, True, 2, 8, 0),
        (9, 4, 2, False, 2, 8, 0),
        (9, 4, 1, False, 3, 9, 1),  # no BatchNorm
        (11, 4, 4, False, 2, 8, 0),  # of two micro-batches one would be a single sample
        (8, 4, 2, False, 2, 8, 0),
        (3, 4, 2, False, 1, 3, 3),
        (3, 4, 2, True, 0, 0, 0),
        (3, 1, 2, False, 3, 3, 0),  # single ones were asked for
    ],
)
def test_a_short_batch_is_kept_where_it_can_be_trained_on(
    count: int, batch_size: int, least: int, drop_last: bool, batches: int, samples: int, short: int
) -> None:
    assert Epoch.of(count, batch_size, least, drop_last) == Epoch(batches, samples, short, least)


def test_an_epoch_without_a_batch_or_with_one_too_small_for_replicas_is_refused() -> None:
    settings = DataConfig(name="folder", batch_size=8)
    Epoch.of(19, 8, 2).check(settings, 19, WHOLE)
    with pytest.raises(ConfigError, match=r"^data.batch_size = 8 is larger than the 5 training images of 'folder'"):
        Epoch.of(5, 8, 2, drop_last=True).check(settings, 5, WHOLE)
    with pytest.raises(ConfigError, match="^the last batch of an epoch of 'folder' has 3 rows, too few for 2 replicas"):
        Epoch.of(19, 8, 2).check(settings, 19, Share(0, 2))
