"""A stage of schedule `free`: it waits for nobody (asynchronous DGL, Belilovsky et al. 2020; ALGORITHMS 4.3).

    stage 0   b0 b1 b2 b3 b4 b5 ... |mark            a step on every batch of the data
    stage 1   b0 b0 b1 b2 b2 b3 ... ....|mark        faster: trains again on what is in its ring
    stage 2   b0    b2    b4    ... ....|mark        slower: batches pass it by

An epoch ends everywhere when the first stage has seen all its data: its mark travels down behind the last batch.
Results depend on timing; that is the price, and ReplayCounts says how much was used again and how much was passed by.
"""

from __future__ import annotations

from pipeline.edges.replay import ReplayReceiver
from pipeline.edges.transport import Received
from pipeline.edges.wire import Directive, Header, MessageKind
from pipeline.stage.stage import Batch, Stage


class FreeStage(Stage):
    """A :class:`Stage` whose input comes from a replay ring.

    Its own steps per epoch may be more or fewer than the first stage's, so it numbers them itself.
    """

    _next_step = 0

    _wanted = Directive.GO

    def begin_epoch(self, first_step: int, resumed_at: int | None = None) -> None:
        """Start an epoch; only the first stage's steps are numbered from ``first_step``."""
        self._wanted = Directive.GO
        self._next_step = max(self._next_step, resumed_at or 0)
        super().begin_epoch(first_step if self._ring() is None else self._next_step)

    def train_step(
        self, epoch: int, step: int, batch: Batch | None, directive: Directive = Directive.GO
    ) -> None:
        """One step; ``step`` is its number at the first stage only. A directive waits for the end of the epoch, which
        STOP makes the next step: before it the stages are at no common step."""
        super().train_step(epoch, step if self._ring() is None else self._next_step, batch)
        self._next_step += 1
        self._wanted = max(self._wanted, directive)
        self.directive = Directive.GO

    def more_steps(self, epoch: int, done: int, planned: int) -> bool:
        """The first stage does the planned steps, every other one goes on until the mark has come."""
        receiver = self._ring()
        if receiver is not None:
            return receiver.ready(epoch, started=done > 0)
        return done < planned and self._wanted is not Directive.STOP

    def end_epoch(self, epoch: int, end_step: int) -> None:
        """Take the mark of the end of the epoch and pass it on, with the directive of the first stage."""
        super().end_epoch(epoch, end_step)
        receiver = self._ring()
        self.directive = self._wanted
        if receiver is not None:
            mark = receiver.take(MessageKind.EPOCH, epoch=epoch, step=end_step, micro_batch=0)
            self.directive = mark.header.directive
            mark.release()
            self._take_counts(receiver)
        if self.edges.activation_out is not None:
            self.edges.activation_out.send(Header(MessageKind.EPOCH, epoch, end_step, 0, directive=self.directive))

    def _take_message(self, epoch: int, step: int, micro_batch: int) -> Received:
        receiver = self._ring()
        assert receiver is not None
        return receiver.read()

    def _ring(self) -> ReplayReceiver | None:
        receiver = self.edges.activation_in
        assert receiver is None or isinstance(receiver, ReplayReceiver)
        return receiver

    def _take_counts(self, receiver: ReplayReceiver) -> None:
        counts = receiver.take_counts()
        self.counters.reused += counts.reused
        self.counters.skipped += counts.skipped
        self.counters.held_back += counts.held_back
