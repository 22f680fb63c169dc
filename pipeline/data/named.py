"""Data sets by name: what opens them, and what they are for where that is no classification of images."""

from __future__ import annotations

from pipeline.base.config import Config
from pipeline.base.data_config import DECODED, SEGMENTED, TEXT
from pipeline.base.numerics import Numerics
from pipeline.data.catalogue import known_entry
from pipeline.data.decoded_source import DecodedSource
from pipeline.data.image_source import ImageSource
from pipeline.data.share import WHOLE, Share
from pipeline.data.source import Source
from pipeline.data.text import TextSource, next_byte
from pipeline.local.segmentation import Segmentation
from pipeline.local.task import Task


def open_named(config: Config, numerics: Numerics, share: Share = WHOLE, whole: bool = False) -> Source:
    """The data set ``data.name``; of it the ``share`` of a replica; ``whole``: tests may have images of other sizes
    than training.

    Raises:
        ConfigError: it is not there, or broken; the line names the path and the fix.
    """
    if config.data.name in DECODED:
        return DecodedSource(config, numerics, share, whole and config.data.name in SEGMENTED)
    return (TextSource if config.data.name == TEXT else ImageSource)(config, numerics, share)


def task_of(config: Config) -> Task | None:
    """What the data set ``data.name`` is for; None: a classification, or whatever its loaders are for."""
    if config.data.name == TEXT:
        return next_byte(config)
    entry = known_entry(config.data)
    if config.data.name in SEGMENTED and entry is not None:
        return Segmentation(entry.classes, entry.image_shape)
    return None
