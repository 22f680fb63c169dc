"""The real peak of memory: every allocation and release that PyTorch's CPU allocator does, replayed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def allocator_peak(run: Callable[[], object]) -> int:
    """The most bytes that ``run`` has allocated on the CPU and not yet freed, at any time. Work space that a library
    such as oneDNN gets for itself is not PyTorch's."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    roots = profiled.profiler.kineto_results.experimental_event_tree()
    sizes = [size for _, size in sorted(_allocations(roots), key=lambda allocation: allocation[0])]
    assert sizes
    return max(itertools.accumulate(sizes))


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """When, and bytes: negative where they are freed."""
    for event in events:
        fields = event.typed[1]
        if hasattr(fields, "alloc_size") and fields.device == torch.device("cpu"):
            yield event.start_time_ns, fields.alloc_size
        yield from _allocations(event.children)
