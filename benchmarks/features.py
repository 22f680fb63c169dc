"""Trained networks and what their blocks give for images of a folder.

    checkpoint --export--> un-cut network --+--> output of every block, in evaluation mode
    folder/test/CLASS/*.png, normalised ----+
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline import ConfigError, export, load_exported

BATCH = 250


@dataclass(frozen=True)
class Trained:
    """A network that has been trained.

    Attributes:
        title: for people.
        network: un-cut, in evaluation mode.
        modules: names of the blocks of every local module.
        image_shape: (C, H, W).
        mean, std: (C, 1, 1), of pixels in [0, 1].
        method: "bp", "dgl", ...
        epoch: from whose end the weights are.
    """

    title: str
    network: nn.Module
    modules: tuple[tuple[str, ...], ...]
    image_shape: tuple[int, ...]
    mean: Tensor
    std: Tensor
    method: str
    epoch: int

    @property
    def blocks(self) -> tuple[str, ...]:
        """All but the classifier, in order."""
        return tuple(name for names in self.modules for name in names)[:-1]

    @torch.no_grad()
    def outputs(self, images: Tensor, batch: int = BATCH) -> Iterator[dict[str, Tensor]]:
        """Of every block, by name, batch after batch. ``images``: uint8 (N, C, H, W)."""
        found: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
            found[name] = output

        hooks: list[Callable[[], None]] = [
            self.network.get_submodule(name).register_forward_hook(partial(keep, name)).remove for name in self.blocks
        ]
        try:
            for part in images.split(batch):
                self.network((part.float() / 255 - self.mean) / self.std)
                yield dict(found)
        finally:
            for remove in hooks:
                remove()


def open_trained(given: str) -> Trained:
    """``TITLE=DIR`` of a checkpoint or a run; without a title the name of the directory.

    Raises:
        ConfigError: there is no checkpoint, or it is of a network that cannot be built by its name.
    """
    title, equals, place = given.rpartition("=")
    source = Path(place)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "exported"
        export(source, target, fmt="hub")
        described = json.loads((target / "config.json").read_text(encoding="utf-8"))
        if described["normalisation"] is None:
            raise ConfigError(f"--runs {given}: how images were normalised is not known; train on a data set by name")
        network = load_exported(target)
    scale = {name: torch.tensor(values).view(-1, 1, 1) for name, values in described["normalisation"].items()}
    modules = tuple(tuple(names) for names in described["modules"])
    return Trained(
        title if equals else source.name, network, modules, tuple(described["image_shape"]), scale["mean"],
        scale["std"], described["method"], described["epoch"],
    )  # fmt: skip


def labelled_images(folder: Path, split: str, count: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The first images of every class by name, in turn: uint8 (N, C, H, W), and their classes (N,).

    Raises:
        ConfigError: no such folder, or an image of another size.
    """
    top = folder / split
    classes = sorted(path for path in top.iterdir() if path.is_dir()) if top.is_dir() else []
    if not classes:
        raise ConfigError(f"--data {folder}: no {split}/CLASS in it")
    files = [sorted(path for path in place.iterdir() if path.is_file()) for place in classes]
    turns = ((path, label) for turn in zip_longest(*files) for label, path in enumerate(turn) if path is not None)
    chosen = [next_one for next_one, _ in zip(turns, range(count), strict=False)]
    images = torch.empty(len(chosen), *shape, dtype=torch.uint8)
    for index, (path, _) in enumerate(chosen):
        pixels = np.array(Image.open(path).convert("RGB" if shape[0] == 3 else "L")).reshape(-1, shape[0])
        if len(pixels) != shape[1] * shape[2]:
            raise ConfigError(f"--data {folder}: '{path}' has not {shape[1]} x {shape[2]} pixels, as in training")
        images[index] = torch.from_numpy(pixels.reshape(*shape[1:], shape[0])).permute(2, 0, 1)
    return images, torch.tensor([label for _, label in chosen])
