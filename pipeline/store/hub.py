"""A trained network as a directory that can be shared: what it is in JSON, its weights, and a page about it.

    mine/config.json          network, classes, shape of an image, normalisation, cut, what was measured
    mine/model.safetensors    the state dict of the un-cut network
    mine/README.md            a model card: what config.json says, for people

Nothing in it is a pickle, so :func:`load_exported` executes nothing that it finds there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError, one_line
from pipeline.base.metric import ERROR
from pipeline.base.version import VERSION
from pipeline.data.catalogue import normalisation
from pipeline.local.weights import HEADS
from pipeline.models.backbones import UncutModel, build_blocks
from pipeline.models.torchvision import torchvision_name
from pipeline.store.checkpoint import Checkpoint
from pipeline.store.run_directory import json_ready

FORMAT = "hub"
"""What an export calls it."""
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_FORMAT = "localpipe-model-1"
_AUXILIARY = re.compile(re.escape(HEADS) + r"module\d+\.")  # "heads." alone begins names of a vision transformer


def files(saved: Checkpoint, config: Config, heads: bool, weights: bytes, ema: bool = False) -> dict[str, bytes]:
    """The directory of a checkpoint, content by name. ``weights``: model.safetensors; ``heads``: whether the auxiliary
    heads are in it; ``ema``: whether it holds moving averages."""
    described = description(saved, config, heads, ema)
    text = json.dumps(described, indent=1, allow_nan=False) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: weights, CARD: card(described).encode()}


def description(saved: Checkpoint, config: Config, heads: bool, ema: bool = False) -> dict[str, Any]:
    """The content of config.json; what nobody knows is null, what was not measured is not there."""
    modules = len(saved.module_names)
    channels = None if saved.custom_network else normalisation(config.data.name, saved.image_shape)
    described = {
        "format": _FORMAT,
        "localpipe": VERSION,
        "model": config.model.name,
        "custom_network": saved.custom_network,
        "task": saved.task,
        "classes": saved.classes,
        "image_shape": saved.image_shape,
        "normalisation": None if channels is None else dict(zip(("mean", "std"), channels, strict=True)),
        "modules": saved.module_names,
        "heads": heads,
        "ema": ema,
        "method": config.method.name if modules > 1 else "bp",
        "cascade_span": config.hierarchy.cascade_span,
        "patches_grid": config.patches.grid,
        "data": config.data.name,
        "step": saved.step,
        "epoch": saved.epoch,
        "metrics": _measured(saved, ema),
        "config_sha256": config.fingerprint(),
    }
    found: dict[str, Any] = json_ready(described)
    return found


def card(described: dict[str, Any]) -> str:
    """README.md: what ``described``, of :func:`description`, says, and no more."""
    modules, data = described["modules"], described["data"]
    name = "a network of one's own" if described["custom_network"] else described["model"]
    cut = (
        f"It was trained as {len(modules)} local modules with losses of their own, of method {described['method']} on "
        f"{described['patches_grid']} x {described['patches_grid']} patches: the gradient of a loss reached at most "
        f"{described['cascade_span']} of the modules."
        if len(modules) > 1
        else "It was trained by backpropagation, as one module."
    )
    shape = ", ".join(map(str, ("B", *described["image_shape"])))
    scale = described["normalisation"]
    entry = (
        f"(x - mean) / std of pixels x in [0, 1], with mean {scale['mean']} and std {scale['std']} per channel"
        if scale
        else "normalised as it was in training, which is not recorded here"
    )
    values = [f"{key}: {value:.6g}" for key, value in described["metrics"].items()]
    tested = (
        f"On the test set of `{data}` after epoch {described['epoch']}: {', '.join(values)}. It is one run, and the "
        "same test set may have been looked at after other epochs."
        if values
        else "At this step nothing was measured."
    )
    loading = (
        "model = pipeline.load_exported(\"DIRECTORY\", network=yours)  # built as it was for training"
        if described["custom_network"]
        else "model = pipeline.load_exported(\"DIRECTORY\")"
    )
    heads = f" The auxiliary heads are in the file, too, under `{HEADS}module`." if described["heads"] else ""
    weights = "moving averages of the weights up to" if described["ema"] else "the weights of"
    return f"""---
library_name: localpipe
tags:
- local-learning
---

# {name}, trained on {data}

{cut} These are {weights} step {described['step']} of a run of localpipe {described['localpipe']}.{heads}

## Use

```python
import pipeline  # localpipe

{loading}
```

In: a batch of shape ({shape}), {entry}. Classes: {described['classes']}.

## Measured

{tested}

## Not known

Under which licence the weights and the training data may be used, and how the network does on other data.
"""


def load_exported(directory: Path | str, *, network: nn.Module | None = None) -> nn.Module:
    """The network that :func:`pipeline.export` has written with format "hub", with its weights, in evaluation mode.

    Args:
        directory: with config.json and model.safetensors.
        network: yours, where it was one of your own; it gets the weights.

    Raises:
        ConfigError: a file is missing, damaged or none of ours; the weights do not fit the network.
    """
    directory = Path(directory)
    described = _described(directory / CONFIG)
    if network is None and described["custom_network"]:
        raise ConfigError(f"'{directory}' is of a network of your own, which no name can rebuild; pass network=...")
    backbone = described["model"] if network is None else ""
    if network is None:
        channels, *sides = described["image_shape"]
        network = UncutModel(build_blocks(backbone, channels, described["classes"], tuple(sides)))
    try:
        state = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"'{directory / WEIGHTS}' cannot be read ({_line(error)}); export it again") from error
    if described["heads"]:
        state = {name: value for name, value in state.items() if not _AUXILIARY.match(name)}
    ours = {torchvision_name(backbone, name): name for name in network.state_dict()}  # the file has torchvision's
    state = {ours.get(name, name): value for name, value in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"'{directory / WEIGHTS}' does not fit the network ({_line(error)})") from error
    return network.eval()


def _described(path: Path) -> dict[str, Any]:
    """What config.json says of a network, of the types that it takes to build it."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path}' cannot be read ({_line(error)}); give a directory that was exported") from error
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise ConfigError(f"'{path}' is not of localpipe's export; its format must be \"{_FORMAT}\"")
    wanted: dict[str, type] = {"model": str, "custom_network": bool, "heads": bool, "classes": int, "image_shape": list}
    for name, kind in wanted.items():
        if type(described.get(name)) is not kind:
            value = json.dumps(described.get(name))[:80]
            raise ConfigError(f"'{path}': {name} = {value}, which must be {kind.__name__}")
    shape = described["image_shape"]
    if not shape or any(type(size) is not int or size < 1 for size in shape) or described["classes"] < 1:
        raise ConfigError(f"'{path}': classes and the sizes of image_shape must be whole numbers from 1 on")
    return described


def _measured(saved: Checkpoint, ema: bool) -> dict[str, float]:
    """Metrics of the test at this step, where there was one; with ``ema`` those of the averages."""
    if saved.manifest["finished_epochs"] != saved.epoch:
        return {}
    record = saved.history()[-1]
    if ema:
        averaged: dict[str, float] = record.get("ema_metrics", {})
        return {f"test_{name}" if name in (ERROR.name, "loss") else name: value for name, value in averaged.items()}
    errors = {f"test_{name}": record.get(f"test_{name}") for name in (ERROR.name, "loss")}
    named = {name: value for name, value in record.get("test_metrics", {}).items() if name != ERROR.name}
    return {name: value for name, value in {**errors, **named}.items() if value is not None}


def _line(error: Exception) -> str:
    return one_line(" ".join(str(error).split()))[:300]
