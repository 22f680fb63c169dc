"""A data set by name feeds the first stage."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.base.config import Config
from pipeline.base.flow import MAIN, TensorSpec
from pipeline.base.numerics import Numerics
from pipeline.data.catalogue import open_data
from pipeline.data.mixing import Mixer
from pipeline.data.normaliser import Normaliser
from pipeline.data.share import WHOLE, Share
from pipeline.data.source import DataSpec
from pipeline.data.stream import ImageStream
from pipeline.stage.inlet import Batch


class ImageSource:
    """A data set by name (``data.name``), augmented on the device; of it the ``share`` of a replica.

    Raises:
        ConfigError: see :func:`pipeline.data.open_data`.
    """

    def __init__(self, config: Config, numerics: Numerics, share: Share = WHOLE) -> None:
        settings = config.data
        data = open_data(
            settings.name,
            settings.root,
            download=settings.download,
            image_size=settings.image_size,
            cache_gib=settings.cache_gib,
            augment=settings.augment,
        )
        parts = config.schedule.micro_batches
        normalise, seed = Normaliser(data.mean, data.std, numerics), config.train.seed
        mixer = Mixer(settings, len(data.classes), seed)
        self._train = ImageStream(
            data, settings.batch_size, seed, normalise, settings.drop_last, share, mixer, least=2 * parts
        )
        epoch = self._train.epoch
        epoch.check(settings, len(data.train), share)
        tests = settings.batch_size // (parts * share.of)
        self._test = ImageStream(data, tests, seed, normalise, share=share, mixer=mixer)
        self.rate = self._train.rate
        self.data_spec = DataSpec(
            classes=len(data.classes),
            inputs={MAIN: TensorSpec(data.image_shape)},
            train_batches=epoch.batches,
            test_batches=self._test.test_batch_count,
            train_images=epoch.samples,
        )

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The augmented batches of ``epoch``."""
        return self._train.train_batches(epoch, start)

    def test(self) -> Iterator[Batch]:
        """The test set as it is."""
        return self._test.test_batches()
