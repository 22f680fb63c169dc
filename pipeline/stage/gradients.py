"""The gradients that the next stage sends: taken in the order in which they were sent, kept until they are used.

    next stage   R3.0->2  R3.1->2 | R3.0->2  R3.1->2 | ...        one line for all: what is not wanted yet is kept
                 step 0             step 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.edges.wire import MessageKind
from pipeline.local.local_module import LocalModule
from pipeline.local.micro_batch import BatchKey
from pipeline.stage.inlet import carried
from pipeline.stage.neighbours import Incoming, Taken
from pipeline.stage.schedule import Action, Message, messages_needed

GRADIENT = "gradient"
"""Field of a message upstream; gradients of tensors other than "x" are called ``gradient.<name>``."""


class GradientInlet:
    """
    Args:
        receiver: end of the edge from the next stage; None: none comes.
        order: (lag, message) of the gradients that the next stage sends during one step, in its order.
        modules: of this stage.
    """

    def __init__(
        self, receiver: Incoming | None, order: Sequence[tuple[int, Message]], modules: Mapping[int, LocalModule]
    ) -> None:
        self._receiver = receiver
        self._order = tuple(order)
        self._modules = modules
        self._last = max(modules)
        self._step = 0  # the next stage's step of the next gradient in line, and its place in that step
        self._place = 0
        self._first_step = 0
        self._end_step: int | None = None
        self._arrived: dict[tuple[int, Message], Taken | None] = {}  # None: restored, there is nothing to release

    def begin_epoch(self, first_step: int, began: int) -> None:
        """Batches of the epoch are numbered from ``first_step``; the next stage's next step is ``began``."""
        self._first_step, self._end_step = first_step, None
        self._step, self._place = began, 0

    def end_epoch(self, end_step: int) -> None:
        """There are no batches from ``end_step`` on."""
        self._end_step = end_step

    def wait_for(self, action: Action, epoch: int, step: int) -> None:
        """Take gradients until those that an action on a batch of ``step`` needs are here."""
        if action.module == self._last:
            for message in messages_needed(action, self._modules[action.module].plan):
                while (step, message) not in self._arrived:
                    self._take(epoch)

    def catch_up(self, epoch: int, step: int) -> None:
        """Take every gradient that the next stage sends up to the end of its ``step``."""
        while self._order and self._step <= step:
            self._take(epoch)

    def restored(self, batch: BatchKey, module: LocalModule) -> None:
        """The module holds gradients of a batch that a checkpoint had in flight."""
        step, micro_batch = batch
        for key in module.in_flight[batch].received if module.plan.index == self._last else ():
            self._arrived[step, (self._last, micro_batch, key)] = None

    def release(self, batch: BatchKey, module: LocalModule) -> None:
        """The module has used its gradients of a batch: give their buffers back."""
        step, micro_batch = batch
        for key in module.plan.incoming:
            received = self._arrived.pop((step, (module.plan.index, micro_batch, key)), None)
            if received is not None:
                received.release()

    def __bool__(self) -> bool:
        """Whether any is here."""
        return bool(self._arrived)

    def _take(self, epoch: int) -> None:
        """Take the gradient that is next in line, unless its batch is none of this epoch."""
        lag, message = self._order[self._place]
        step = self._step - lag
        self._place += 1
        if self._place == len(self._order):
            self._step, self._place = self._step + 1, 0
        if step < self._first_step or (self._end_step is not None and step >= self._end_step):
            return
        module, micro_batch, key = message
        assert self._receiver is not None
        received = self._receiver.take(
            MessageKind.GRADIENT, epoch=epoch, step=step, micro_batch=micro_batch, key=key
        )
        self._arrived[step, message] = received
        self._modules[module].receive((step, micro_batch), key, carried(received.fields, GRADIENT))
