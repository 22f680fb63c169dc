"""Data sets by name: what opens them, and what they are for where that is no classification of images."""

from __future__ import annotations

from pipeline.base.config import DECODED, SEGMENTED, Config
from pipeline.base.numerics import Numerics
from pipeline.data.catalogue import known_entry
from pipeline.data.decoded_source import DecodedSource
from pipeline.data.image_source import ImageSource
from pipeline.data.source import Source
from pipeline.local.segmentation import Segmentation
from pipeline.local.task import Task


def open_named(config: Config, numerics: Numerics, whole: bool = False) -> Source:
    """The data set ``data.name``; ``whole``: tests may have images of other sizes than training.

    Raises:
        ConfigError: it is not there, or broken; the line names the path and the fix.
    """
    if config.data.name in DECODED:
        return DecodedSource(config, numerics, whole and config.data.name in SEGMENTED)
    return ImageSource(config, numerics)


def task_of(config: Config) -> Task | None:
    """What the data set ``data.name`` is for; None: a classification, or whatever its loaders are for."""
    entry = known_entry(config.data)
    if config.data.name in SEGMENTED and entry is not None:
        return Segmentation(entry.classes, entry.image_shape)
    return None
