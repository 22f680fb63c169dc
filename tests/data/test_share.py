"""The share of a replica: all rows of a batch and all batches of a test, each once, in one order for any number."""

from __future__ import annotations

import pytest
import torch

from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics
from pipeline.data.augmentation import Augmentation
from pipeline.data.images import CachedImages, ImageData
from pipeline.data.normaliser import Normaliser
from pipeline.data.share import WHOLE, Share
from pipeline.data.stream import ImageStream
from pipeline.stage.inlet import split

NUMERICS = Numerics(torch.device("cpu"), torch.float32, False)


def stream(share: Share) -> ImageStream:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (21, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = CachedImages(pixels, torch.arange(21))
    policy = Augmentation(2, "zeros", flip=True)
    data = ImageData(images, images, ("a",), (3, 8, 8), (0.5,) * 3, (0.5,) * 3, policy, "numbers")
    return ImageStream(data, 8, 3, Normaliser(data.mean, data.std, NUMERICS), share=share)


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_shares_of_a_batch_are_its_rows_in_order(replicas: int) -> None:
    whole = list(stream(WHOLE).train_batches(2))
    shares = [list(stream(Share(index, replicas)).train_batches(2)) for index in range(replicas)]
    assert [len(batches) for batches in shares] == [3] * replicas
    for number, batch in enumerate(whole):
        parts = [batches[number] for batches in shares]
        for name in ("x", "labels", "image"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        scales = [given.batch.scale for part in parts for given in split(part, 1)]
        assert sum(scales) == pytest.approx(1.0) and max(len(p.labels) for p in parts) - len(parts[-1].labels) <= 1


def test_shares_of_a_test_are_its_batches() -> None:
    whole = [batch.labels.tolist() for batch in stream(WHOLE).test_batches()]
    shares = [[batch.labels.tolist() for batch in stream(Share(i, 2)).test_batches()] for i in range(2)]
    assert [shares[0][0], shares[1][0], shares[0][1]] == whole and len(shares[1]) == 1


def test_a_short_batch_that_cannot_be_shared_is_refused() -> None:
    Share(0, 2).check_short("digits", 4, 2)
    Share(0, 2).check_short("digits", 0, 2)
    WHOLE.check_short("digits", 1, 2)
    with pytest.raises(ConfigError, match="^the last batch of an epoch of 'digits' has 3 rows, too few for 2 replicas"):
        Share(0, 2).check_short("digits", 3, 2)
