"""Drawn images in an image folder, and two tiny networks trained on them: for a try of what needs trained networks."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from pipeline import load_config, train

CLASSES = ("bars", "columns", "rings", "checks")
SIDE = 16


def draw_images(folder: Path, train_images: int = 20, test_images: int = 10) -> Path:
    """Four classes of coloured patterns with noise, so many images of each, as ``folder/SPLIT/CLASS/NUMBER.png``."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    patterns = (rows // 2 % 2, columns // 2 % 2, ((rows - 7.5) ** 2 + (columns - 7.5) ** 2).sqrt().long() // 2 % 2,
                (rows // 4 + columns // 4) % 2)  # fmt: skip
    for split, count in (("train", train_images), ("test", test_images)):
        for name, pattern in zip(CLASSES, patterns, strict=True):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                colour = torch.randint(60, 200, (3, 1, 1), generator=generator)
                noise = torch.randint(0, 50, (3, SIDE, SIDE), generator=generator)
                pixels = (colour * pattern + noise).to(torch.uint8)
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / split / name / f"{index:03}.png")
    return folder


def train_two(folder: Path) -> tuple[Path, tuple[str, str]]:
    """The images, and ``TITLE=DIR`` of a network trained by backpropagation and one by DGL + HPFF, one epoch each."""
    data = draw_images(folder / "images")
    keys = [
        "model.name=resnet20", "data.name=folder", f'data.root="{data}"', "data.batch_size=20", "train.epochs=1",
        "optim.schedule=constant", "optim.warmup_epochs=0", "optim.lr=0.05", "model.cuts=even", "log.curve=false",
        "precision.compute=fp32", "runtime.device=cpu", "runtime.threads=1", "partition.kind=count", "method.name=dgl",
    ]  # fmt: skip
    for title, more in (("BP", ["model.modules=1"]), ("DGL", ["model.modules=3", "hierarchy.cascade_span=2"])):
        grid = ["patches.grid=1"] if title == "BP" else ["patches.grid=2", "patches.at_once=4"]
        config = load_config(assignments=["hierarchy.cascade_span=1", *keys, *more, *grid])
        train(config, run_dir=folder / title, quiet=True)
    return data, (f"BP={folder / 'BP'}", f"DGL + HPFF={folder / 'DGL'}")
