"""Copies of tensors of the device on the host, for which the main thread does not wait.

    main thread    to_host(a)  to_host(b) ...  arrival()  next step
    main stream    ...step | a | b | ---event---> | next step              the copies are made between two steps
    other thread                       wait until they are there, then read them
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_host(value: Tensor) -> Tensor:
    """A copy on the CPU that later work does not change. From a GPU it comes into pinned memory and is still on its
    way: read it only after an :func:`arrival`."""
    value = value.detach()
    if not value.is_cuda:
        return value.to("cpu", copy=True)
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)


def arrival(device: torch.device) -> Callable[[], None]:
    """What blocks until all that the current stream of ``device`` has been given so far is done. For any thread."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event.synchronize
