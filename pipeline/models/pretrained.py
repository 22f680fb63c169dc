"""Weights that a run begins with: a file with the state dict of the un-cut network, as torchvision, timm and an export
have it.

    conv1.weight --> block stem, conv1.weight            layer4.1.bn2.bias --> block layer4.1, bn2.bias
    fc.weight of 1,000 classes, where the data have 10 --> stays as it is drawn, and a line says so

Of a DeepLabV3 the file may be one of the ResNet that it stands on: then its own heads stay as they are drawn, and the
ResNet's classifier has no place.
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
from pipeline.models.torchvision import DEEPLABS, name_in_backbone_file, torchvision_name

KEY = "model.weights"
_COUNTER = "num_batches_tracked"  # older files have none
_CLASSIFIER = ("fc.weight", "fc.bias")  # of a ResNet


class PretrainedWeights:
    """The tensors of a file, and which of them go where in a network.

    Args:
        path: of a .safetensors file, or of one that ``torch.save`` has written; nothing in it is executed.
        backbone: ``model.name``.
        blocks: the network, which may be planned.
        classes: of the data. A last layer of another number of classes is left out.

    Attributes:
        drawn: names of what is left out.
        of_backbone: the file is one of the ResNet that the network stands on.

    Raises:
        ConfigError: the file cannot be read, or is of another network.
    """

    def __init__(self, path: str, backbone: str, blocks: Blocks, classes: int) -> None:
        self._path = path
        self._tensors = _read(path)
        self._places: dict[str, dict[str, str]] = {}
        self.drawn: tuple[str, ...] = ()
        last = next(reversed(blocks))
        of_last = [f"{last}.{key}" for key in blocks[last].state_dict()]
        has_last = any(name in self._tensors for key in of_last for name in (key, torchvision_name(backbone, key)))
        self.of_backbone = backbone in DEEPLABS and not has_last
        unused = set(self._tensors) - (set(_CLASSIFIER) if self.of_backbone else set())
        for name, block in blocks.items():
            self._places[name] = {}
            for key, ours in block.state_dict(keep_vars=True).items():
                own = uncut_name(f"{name}.{key}")
                names = self._names_of(backbone, own)
                if not names:
                    continue
                theirs = next((n for n in names if n in self._tensors), None)
                if theirs is None:
                    if key.endswith(_COUNTER):
                        continue
                    raise self._refusal(backbone, f"'{names[0]}' is missing in it")
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
        if self.of_backbone:
            self.drawn = tuple(dict.fromkeys(torchvision_name(backbone, key).partition(".")[0] for key in of_last))

    def _names_of(self, backbone: str, own: str) -> tuple[str, ...]:
        """The names under which the file may have it; none of what a file of a ResNet alone has not."""
        if self.of_backbone:
            name = name_in_backbone_file(backbone, own)
            return () if name is None else (name,)
        return torchvision_name(backbone, own), own

    def load_into(self, blocks: Blocks) -> None:
        """Copy what belongs to each of ``blocks`` into it."""
        with torch.no_grad():
            for name, block in blocks.items():
                state = block.state_dict()
                for key, theirs in self._places[name].items():
                    state[key].copy_(self._tensors[theirs])

    def __str__(self) -> str:
        if self.of_backbone:
            without = [name for name in _CLASSIFIER if name in self._tensors]
            unused = f"; not used: {', '.join(without)}" if without else ""
            return f"begins with the backbone of {self._path}; drawn anew: {', '.join(self.drawn)}{unused}"
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
