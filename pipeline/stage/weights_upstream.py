"""The slow channel of a stage for weights upstream: shares those of its modules, takes those of the next stage.

    stage r     A of module m   <-- mailbox of m   <-- edge, one message every n steps -- S of module m+1    stage r+1
                A of module m-1 <-- mailbox of m-1 <-- S of module m      within a stage: no edge, the same mailbox

Which batch's weights are adopted in which step stands in the schedule. The receives of the edge are as many as there
can be copies under way, so who shares never waits; who adopts waits only for weights that are due and not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.edges.wire import Header, MessageKind
from pipeline.local.local_module import LocalModule
from pipeline.stage.neighbours import Neighbours
from pipeline.stage.schedule import Action, Kind

WEIGHTS = "weights"
"""Field of a message: all parameters of the block, (1, elements)."""


class WeightsUpstream:
    """
    Args:
        edges: to the neighbours.
        schedule: of the stage.
        modules: of the stage.
    """

    def __init__(self, edges: Neighbours, schedule: Sequence[Action], modules: Mapping[int, LocalModule]) -> None:
        self._edges = edges
        self._modules = modules
        self._adopting = next((a for a in schedule if a.kind is Kind.ADOPT and a.module == max(modules)), None)
        self._next = 0  # batch of the next message in line

    def begin_epoch(self, first_step: int, began: int) -> None:
        """Batches of the epoch are numbered from ``first_step``; the next stage's next step is ``began``."""
        if self._adopting is not None:
            every = self._adopting.every
            self._next = -(-max(first_step, began - self._sender_lag) // every) * every

    def share(self, module: LocalModule, epoch: int, step: int) -> None:
        """To the module before, here or on the previous stage: the weights after the update of batch ``step``."""
        flat, before = module.share(), self._modules.get(module.plan.index - 1)
        if before is not None:
            assert before.mailbox is not None
            before.mailbox.put(step, flat)
        else:
            assert self._edges.weights_out is not None
            header = Header(MessageKind.WEIGHTS, epoch, step, -1, rows=1, batch_rows=1)
            self._edges.weights_out.send(header, weights=flat)

    def wait_for(self, action: Action, epoch: int, step: int) -> None:
        """Take weights of the next stage until those that an action on batch ``step`` needs are here."""
        if action == self._adopting:
            while self._next <= step:
                self._take(epoch)

    def catch_up(self, epoch: int, step: int) -> None:
        """Take all weights that the next stage sends up to the end of its ``step``."""
        while self._adopting is not None and self._next + self._sender_lag <= step:
            self._take(epoch)

    @property
    def _sender_lag(self) -> int:
        """How late the next stage's module makes its update."""
        assert self._adopting is not None
        mailbox = self._modules[self._adopting.module].mailbox
        assert mailbox is not None
        return self._adopting.lag - mailbox.declared.lag

    def _take(self, epoch: int) -> None:
        assert self._adopting is not None and self._edges.weights_in is not None
        mailbox = self._modules[self._adopting.module].mailbox
        assert mailbox is not None
        received = self._edges.weights_in.take(MessageKind.WEIGHTS, epoch=epoch, step=self._next, micro_batch=-1)
        mailbox.put(self._next, received.fields[WEIGHTS])
        received.release()
        self._next += self._adopting.every
