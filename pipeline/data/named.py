"""Data sets by name: what opens them, and what they are for where that is no classification of images."""

from __future__ import annotations

from pipeline.base.config import Config
from pipeline.base.numerics import Numerics
from pipeline.data.image_source import ImageSource
from pipeline.data.share import WHOLE, Share
from pipeline.data.source import Source
from pipeline.data.text import TEXT, TextSource, next_byte
from pipeline.local.task import Task


def open_named(config: Config, numerics: Numerics, share: Share = WHOLE) -> Source:
    """The data set ``data.name``; of it the ``share`` of a replica.

    Raises:
        ConfigError: it is not there, or broken; the line names the path and the fix.
    """
    return (TextSource if config.data.name == TEXT else ImageSource)(config, numerics, share)


def task_of(config: Config) -> Task | None:
    """What the data set ``data.name`` is for; None: a classification, or whatever its loaders are for."""
    return next_byte(config) if config.data.name == TEXT else None
