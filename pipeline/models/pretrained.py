"""Weights that a run begins with: a file with the state dict of the un-cut network, as torchvision, timm and an export
have it.

    conv1.weight --> block stem, conv1.weight            layer4.1.bn2.bias --> block layer4.1, bn2.bias
    fc.weight of 1,000 classes, where the data have 10 --> stays as it is drawn, and a line says so
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.base.errors import ConfigError, shown
from pipeline.base.paths import path_of
from pipeline.models.backbones import Blocks
from pipeline.models.part import uncut_name
from pipeline.models.torchvision import torchvision_name

KEY = "model.weights"
_COUNTER = "num_batches_tracked"  # older files have none


class PretrainedWeights:
    """The tensors of a file, and which of them go where in a network.

    Args:
        path: of a .safetensors file, or of one that ``torch.save`` has written; nothing in it is executed.
        backbone: ``model.name``.
        blocks: the network, which may be planned.
        classes: of the data. A last layer of another number of classes is left out.

    Attributes:
        drawn: names of what is left out.

    Raises:
        ConfigError: the file cannot be read, or is of another network.
    """

    def __init__(self, path: str, backbone: str, blocks: Blocks, classes: int) -> None:
        self._path = path
        self._tensors = _read(path)
        self._places: dict[str, dict[str, str]] = {}
        self.drawn: tuple[str, ...] = ()
        last, unused = next(reversed(blocks)), set(self._tensors)
        for name, block in blocks.items():
            self._places[name] = {}
            for key, ours in block.state_dict(keep_vars=True).items():
                own = uncut_name(f"{name}.{key}")
                theirs = next((n for n in (torchvision_name(backbone, own), own) if n in self._tensors), None)
                if theirs is None:
                    if key.endswith(_COUNTER):
                        continue
                    wanted = torchvision_name(backbone, own)
                    raise self._refusal(backbone, f"'{wanted}' is missing in it")
                unused.discard(theirs)
                shape, there = tuple(ours.shape), tuple(self._tensors[theirs].shape)
                if shape == there:
                    self._places[name][key] = theirs
                elif name == last and shape[0] == classes and shape[1:] == there[1:]:
                    self.drawn += (theirs,)
                else:
                    raise self._refusal(backbone, f"'{theirs}' is {there} in it and {shape} in this network")
        if unused:
            raise self._refusal(backbone, f"this network has no {shown(min(unused))}")

    def load_into(self, blocks: Blocks) -> None:
        """Copy what belongs to each of ``blocks`` into it."""
        with torch.no_grad():
            for name, block in blocks.items():
                state = block.state_dict()
                for key, theirs in self._places[name].items():
                    state[key].copy_(self._tensors[theirs])

    def __str__(self) -> str:
        left_out = f"; drawn anew for these classes: {', '.join(self.drawn)}" if self.drawn else ""
        return f"begins with the weights of {self._path}{left_out}"

    def _refusal(self, backbone: str, why: str) -> ConfigError:
        return ConfigError(
            f"{KEY} = {shown(self._path)} does not fit {backbone} on these images: {why}; give a state dict of this "
            "network"
        )


def sha256_of(path: str) -> str:
    """Of the file. Raises ConfigError: it cannot be read."""
    try:
        with open(path_of(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error.strerror) from error


def _read(path: str) -> Mapping[str, Tensor]:
    file = Path(path_of(path))
    try:
        found: Any = load_file(file) if file.suffix == ".safetensors" else (
            torch.load(file, map_location="cpu", weights_only=True)
        )
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:100]
        raise _unreadable(path, why) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise _unreadable(path, "it holds something else than a flat dict of tensors")
    return found


def _unreadable(path: str, why: str | None) -> ConfigError:
    return ConfigError(
        f"{KEY} = {shown(path)} cannot be read ({why}); give a state dict, .safetensors or written by torch.save"
    )
