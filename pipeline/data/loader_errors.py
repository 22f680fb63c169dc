"""What can go wrong in a user's loader, in one line each that names the loader."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.base.errors import ConfigError, DataError, LocalpipeError
from pipeline.base.flow import LABEL, MAIN, Flow, Specs, Tensors, TensorSpec, named

T = TypeVar("T")
ACCEPTED = (
    "give (inputs, labels): images (B, C, H, W), uint8 or floating point, or ids (B, T), or a dict of named tensors "
    "with 'x' among them; and labels"
)


def checked(
    batch: Any, which: str, inputs: Specs | None = None, target: TensorSpec = LABEL
) -> tuple[Tensors, Tensor]:
    """``batch`` of the ``which`` ("train", "test") loader, if it is a pair that can be trained on, as named tensors and
    labels.

    Args:
        inputs: what the task says of them, or what the batches before it have shown; None: there is neither.
        target: of the task.

    Raises:
        ConfigError: it is anything else; the message says what it is, and what is accepted.
    """
    accepted = f"{ACCEPTED} {_expected(target)}"
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)
    if not pair or not _is_named_set(batch[0]):
        raise ConfigError(f"the {which} loader gave {_kind(batch)}; {accepted}")
    tensors, labels = named(batch[0]), _as_shares(batch[1], target)
    main = tensors[MAIN]
    shapes = f"{_names(batch[0])} and labels {_tensor(labels)}"
    if main.dim() < 2 or main.is_complex() or (main.dim() == 4 and _is_integer(main) and main.dtype != torch.uint8):
        raise ConfigError(f"the {which} loader gave {shapes}; {accepted}")
    same_kind = labels.is_floating_point() if target.dtype.is_floating_point else _is_integer(labels)
    if not same_kind or labels.dim() == 0 or len(labels) == 0 or not target.fits(labels):
        raise ConfigError(f"the {which} loader gave {shapes}; {accepted}")
    if any(x.dim() == 0 or len(x) != len(labels) for x in tensors.values()):
        raise ConfigError(f"the {which} loader gave {shapes}; {accepted}")
    if inputs is not None:
        _compare(tensors, which, inputs)
    return tensors, labels


def _as_shares(labels: Tensor, target: TensorSpec) -> Tensor:
    """Classes (B,) as shares of all classes (B, classes), where the target is such: a test loader mixes nothing."""
    soft = target.dtype.is_floating_point and len(target.shape) == 1
    if not soft or labels.dim() != 1 or not _is_integer(labels):
        return labels
    return (labels[:, None] == torch.arange(target.shape[0], device=labels.device)).to(target.dtype)


def _compare(tensors: Tensors, which: str, inputs: Specs) -> None:
    """Raises ConfigError where a batch does not fit what is known of all."""
    if tensors.keys() != inputs.keys():
        raise ConfigError(
            f"the {which} loader gave {', '.join(tensors)} where it is to give {', '.join(inputs)}; name them alike in "
            "every batch"
        )
    for name, spec in inputs.items():
        what, shape = "images" if inputs.keys() == {MAIN} else f"'{name}'", tuple(tensors[name].shape[1:])
        floating = tensors[name].is_floating_point() or (name == MAIN and tensors[name].dtype == torch.uint8)
        if floating != spec.dtype.is_floating_point or not (floating or tensors[name].dtype == spec.dtype):
            raise ConfigError(
                f"the {which} loader gave {what} {_tensor(tensors[name])} after {what} of "
                f"{str(spec.dtype).removeprefix('torch.')}; give one dtype in all batches"
            )
        if spec.fits(tensors[name]):
            continue
        if spec.varies:
            raise ConfigError(
                f"the {which} loader gave {what} of shape {shape}, the longest may have {spec.shape}; cut them, or "
                "announce longer ones (max_length)"
            )
        raise ConfigError(
            f"the {which} loader gave {what} of shape {shape} after {what} of shape {spec.shape}; make them equal "
            "(resize or crop them), or announce that their length varies (max_length)"
        )


def _expected(target: TensorSpec) -> str:
    axes = ", ".join(["B", *map(str, target.shape)]) + ("" if target.shape else ",")
    return f"({axes}), {'floating point' if target.dtype.is_floating_point else 'integers'}"


def _is_named_set(value: Any) -> bool:
    if isinstance(value, dict):
        return MAIN in value and all(
            isinstance(name, str) and name.isidentifier() and isinstance(x, Tensor) for name, x in value.items()
        )
    return isinstance(value, Tensor)


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _names(value: Flow) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_tensor(x)}" for name, x in value.items())
    return f"images {_tensor(value)}"


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


def guarded(batches: Generator[T, None, None], which: str) -> Iterator[T]:
    """The batches of the ``which`` loader, under :func:`named_deaths` from the first one on, which starts the workers;
    closed with it."""
    with closing(batches):
        first = next(batches, None)
        if first is not None:
            with named_deaths(which):
                yield first
                yield from batches
