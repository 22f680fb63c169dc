"""Replicas: what the twins of a stage add up before every update, so that all of them go on with the same weights.

    replica 0    rows 0 .. 3 of 8    share 4/8    gradients, losses --+
                                                                      +--> sums: those of the whole batch
    replica 1    rows 4 .. 7 of 8    share 4/8    gradients, losses --+

A replica is to the batch what a micro-batch is: its losses are means over its rows times their share of the batch, so
plain sums give gradient and loss of the batch, also where the shares differ (the short last batch of an epoch). Running
statistics (of BatchNorm) are averaged. After an update nothing differs between twins, which is why one of them can save
for all; a loss that is not finite on one replica is not finite on any, and all do the same about it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.edges.twins import Sum, Twins
from pipeline.local.local_module import LocalModule


class Averaging:
    """Of the local modules of one rank; see above."""

    def __init__(self, twins: Twins) -> None:
        self.twins = twins
        self._under_way: dict[tuple[int, int], tuple[Sum, list[Tensor], Sequence[Tensor]]] = {}
        self._last: dict[int, Sum] = {}  # by module: that of its last update
        self._norms: dict[int, list[_NormBase]] = {}  # by module; its layers stay the same

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for twins so far."""
        return self.twins.wait_s

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to twins so far."""
        return self.twins.bytes_sent

    def begin_alike(self, modules: list[LocalModule]) -> None:
        """All twins take on the weights of the first replica: a user's network may be drawn anew in every process."""
        with torch.no_grad():
            for module in modules:
                parts = (*module.blocks.values(), *module.levels.values())
                self.twins.begin_alike([t for part in parts for t in (*part.parameters(), *part.buffers())])

    @torch.no_grad()
    def begin(self, module: LocalModule, step: int) -> None:
        """All gradients of the batch of ``step`` are there."""
        gradients = module.gradients(step)
        losses = [loss.float() if loss.dtype.itemsize < 4 else loss for loss in _open(module, step).values()]
        together = [torch.stack(losses)] if losses else []  # a module without a head has none
        running = [buffer.detach() for buffer in self._statistics(module)]
        statistics = torch._foreach_div(running, self.twins.size) if running else []
        what = f"average module {module.plan.index} over the replicas"
        total = self.twins.sum([*gradients, *together, *statistics], what)
        self._under_way[module.plan.index, step] = total, together, statistics

    @torch.no_grad()
    def finish(self, module: LocalModule, step: int) -> None:
        """Gradients and losses of ``step`` are those of the whole batch now, on a GPU for the current stream: the host
        is an update ahead of it at most. Raises DeadlineExceeded, PeerLost."""
        index = module.plan.index
        total, together, statistics = self._under_way.pop((index, step))
        total.wait()
        if index in self._last:
            self._last[index].settle()
        self._last[index] = total
        if module.guard.skips:  # which reads what has been summed before it goes on
            total.settle()
        if together:
            module.losses.open[step] = dict(zip(_open(module, step), together[0].unbind(), strict=True))
        for buffer, mean in zip(self._statistics(module), statistics, strict=True):
            buffer.data.copy_(mean)  # .data: graphs of later batches hold them, and their backward reads none

    def settle(self) -> None:
        """All sums are over, and the host knows it. Raises DeadlineExceeded, PeerLost."""
        for total in self._last.values():
            total.settle()
        self._last.clear()

    def _statistics(self, module: LocalModule) -> list[Tensor]:
        """Running statistics, which follow the rows that a replica sees; SyncBatchNorm's follow those of all."""
        index = module.plan.index
        if index not in self._norms:
            layers = [layer for part in (*module.blocks.values(), *module.levels.values()) for layer in part.modules()]
            self._norms[index] = [
                layer for layer in layers if isinstance(layer, _NormBase) and not isinstance(layer, nn.SyncBatchNorm)
            ]
        both = (statistic for layer in self._norms[index] for statistic in (layer.running_mean, layer.running_var))
        return [statistic for statistic in both if statistic is not None]


def _open(module: LocalModule, step: int) -> dict[str, Tensor]:
    return module.losses.open.get(step, {})
