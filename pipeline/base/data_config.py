"""The section ``data`` of the configuration, and which data sets have a name."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.base.keys import key

DATA_SETS = (
    "digits", "cifar10", "cifar100", "svhn", "stl10", "folder", "imagenet", "cityscapes", "shapes", "text",
)
CITYSCAPES, SHAPES = "cityscapes", "shapes"
SEGMENTED = (CITYSCAPES, SHAPES)  # data sets with a class for every pixel
TEXT = "text"
DECODED = ("imagenet", CITYSCAPES)  # data sets that worker processes decode and augment


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    name: str = key(
        "digits",
        "the data set; folder: class directories of images; imagenet: the same, decoded and augmented by workers; "
        "cityscapes: classes of pixels; shapes: generated scenes with classes of pixels; text: a file of bytes, of "
        "which the next is told; loader: given to train() as it is",
        choices=(*DATA_SETS, "loader"),
    )
    root: str = key("", "directory of the data set; for folder a directory or a tar file, for text a file")
    download: bool = key(False, "let torchvision fetch a missing data set")
    batch_size: int = key(64, "images per step, over all replicas and micro-batches", at_least=1, at_most=2**20)
    image_size: int = key(
        0,
        "folder: resize and crop to this many pixels; 0 = images have one size already; imagenet: random crops "
        "resized to it, for the test 8/7 of it and the centre; 0 = 224",
        at_least=0, at_most=16_384,
    )
    crop: tuple[int, ...] = key(
        (512, 1024), "cityscapes: height and width of the crops that are trained on", at_least=1, at_most=16_384,
        length=2,
    )
    workers: int = key(4, "imagenet, cityscapes: processes that decode and augment", at_least=1, at_most=1024)
    length: int = key(128, "text: bytes of a sequence", at_least=1, at_most=2**20)
    augment: str = key(
        "auto", "auto: as is usual for the data set; text: an epoch begins anywhere", choices=("auto", "none")
    )
    mixup: float = key(
        0.0, "alpha of mixup, for classes of whole images: two images of a batch are blended; 0 = none",
        at_least=0, at_most=10**6,
    )
    cutmix: float = key(
        0.0, "alpha of CutMix: a box of another image is pasted; with mixup: half of the batches each; 0 = none",
        at_least=0, at_most=10**6,
    )
    test_scales: tuple[float, ...] = key(
        (1.0,), "evaluation of classes of pixels: whole images in these sizes, the class probabilities averaged",
        at_least=0.1, at_most=10,
    )
    test_flip: bool = key(False, "evaluation of classes of pixels: the mirrored images too")
    drop_last: bool = key(False, "leave the short last batch of an epoch out")
    cache_gib: float = key(4.0, "keep decoded images in memory up to this size, in GiB", at_least=0, at_most=10**6)
