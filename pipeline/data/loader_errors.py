"""What can go wrong in a user's loader, in one line each that names the loader."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.base.errors import ConfigError, DataError, LocalpipeError

ACCEPTED = "give (images, labels): images (B, C, H, W), uint8 or floating point, and labels (B,), integers"


def checked(batch: Any, which: str, image_shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """``batch`` of the ``which`` ("train", "test") loader, if it is a pair that can be trained on.

    Args:
        image_shape: (C, H, W) of the images before it, if there are any.

    Raises:
        ConfigError: it is anything else; the message says what it is, and what is accepted.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise ConfigError(f"the {which} loader gave {_kind(batch)}; {ACCEPTED}")
    image, labels = batch
    shapes = f"images {_tensor(image)} and labels {_tensor(labels)}"
    if image.dim() < 2 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise ConfigError(f"the {which} loader gave {shapes}; {ACCEPTED}")
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.dim() != 1 or not whole or len(labels) != len(image) or len(labels) == 0:
        raise ConfigError(f"the {which} loader gave {shapes}; {ACCEPTED}")
    if image_shape is not None and tuple(image.shape[1:]) != image_shape:
        raise ConfigError(
            f"the {which} loader gave images of shape {tuple(image.shape[1:])} after images of shape {image_shape}; "
            "make them equal (resize or crop them)"
        )
    return image, labels


def _kind(batch: Any) -> str:
    if isinstance(batch, dict):
        return f"a dict with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, Tensor):
        return f"one tensor {_tensor(batch)}"
    if isinstance(batch, tuple | list):
        parts = (_tensor(part) if isinstance(part, Tensor) else type(part).__name__ for part in batch[:6])
        return f"a {type(batch).__name__} of {len(batch)}: {', '.join(parts)}"
    return f"a {type(batch).__name__}"


def _tensor(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


@contextmanager
def named_errors(which: str) -> Iterator[None]:
    """What the ``which`` loader raises is a DataError that names it; of an error in a worker, its last words."""
    try:
        yield
    except LocalpipeError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            raise DataError(f"a worker of the {which} loader died: {error}") from error
        raise DataError(f"the {which} loader failed: {_last_words(error)}") from error


def _last_words(error: Exception) -> str:
    """torch puts the traceback of a worker before them, which is indented where it is not a heading."""
    lines = str(error).splitlines()
    if "in DataLoader worker process" not in str(error):
        return f"{type(error).__name__}: {error}"
    end = max((number for number, line in enumerate(lines) if line.startswith("  ")), default=0)
    return " ".join(lines[end + 1 :])


@contextmanager
def named_deaths(which: str) -> Iterator[None]:
    """While the ``which`` loader is read: the death of a worker is a DataError that names the loader.

    torch raises a RuntimeError, in its handler of SIGCHLD: wherever the main thread happens to be, where a wait for
    another rank would take it for a lost connection. The handler is that of the moment, so enter this once the workers
    run.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def named(number: int, frame: Any) -> None:
        try:
            handler(number, frame)
        except RuntimeError as error:
            raise DataError(f"a worker of the {which} loader died: {error}") from None

    signal.signal(signal.SIGCHLD, named)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
