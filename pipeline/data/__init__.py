"""Images: where they come from, how they are augmented, in which order they are trained."""

from pipeline.data.augmentation import Augmentation, augment
from pipeline.data.catalogue import CATALOGUE, open_data
from pipeline.data.images import CachedImages, ImageData, ImageSet, LazyImages
from pipeline.data.stream import ImageStream, epoch_order

__all__ = [
    "CATALOGUE",
    "Augmentation",
    "CachedImages",
    "ImageData",
    "ImageSet",
    "ImageStream",
    "LazyImages",
    "augment",
    "epoch_order",
    "open_data",
]
