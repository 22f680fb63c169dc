"""Two steps of recipes, on two ranks and a few small images."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from helpers_spawn import run_ranks
from PIL import Image

from pipeline import load_config, train
from pipeline.data import shapes

PLAIN = ("partition.kind=count", "patches.at_once=1", "precision.compute=fp32", "runtime.device=cpu", "log.curve=false")
FEW = ("data.batch_size=4", "train.max_steps=2", "train.epochs=2", "checkpoint.every_epochs=0")


def two_steps_of_all(names: list[str], side: int, folder: Path) -> list[int]:
    """Steps that two ranks do of each of these recipes, one after another; those of backpropagation, which have one
    module, as two replicas."""
    images(folder / "images", side)
    results = run_ranks(_two_steps, 2, names, side, str(folder), timeout_s=120.0 + 20.0 * len(names))
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    steps: list[int] = results[0].value
    return steps


@mock.patch.object(shapes, "TRAIN", 8)
@mock.patch.object(shapes, "TEST", 2)
def _two_steps(rank: int, names: list[str], side: int, folder: str) -> list[int]:
    done = []
    for name in names:
        if name.startswith("cityscapes"):
            data = ["data.name=shapes"]
        elif name.startswith("text"):
            data = [f"data.root={folder}/images/text"]
        else:
            data = ["data.name=folder", f"data.root={folder}/images", f"data.image_size={side}"]
        replicas = [f"parallel.replicas={2 if '-bp' in name else 1}"]
        config = load_config(name, assignments=[*data, *FEW, *PLAIN, *replicas], say=lambda _: None)
        done.append(int(train(config, run_dir=Path(folder) / name, quiet=True)["steps"]))
    return done


def images(folder: Path, side: int) -> None:
    """Two classes of four images and a test image each; and a text."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("test", 1)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(256, (side, side, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / label / f"{index}.png")
    (folder / "text").write_bytes(bytes(range(256)) * 8)
