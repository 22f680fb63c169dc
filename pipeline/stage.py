"""One rank: runs its schedule over its local modules and its edges.

                 activation, labels (, image)
    stage r-1  ------------------------------>  stage r  ------------------------------>  stage r+1
               <------------------------------           <------------------------------
                 gradient, one per key of the hierarchy; only where a cascade crosses the edge

The stage knows nothing of epochs, files or screens. Everything it waits for has a deadline (see transport).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pipeline.connect import Edges
from pipeline.errors import DataError
from pipeline.local_module import LocalModule
from pipeline.schedule import Action, Kind, Message, messages_needed, messages_sent
from pipeline.transport import Message as Received
from pipeline.transport import Receiver, Sender
from pipeline.wire import Header, MessageKind


@dataclass(frozen=True)
class Batch:
    """A whole batch at the first stage: normalised ``x`` (B, C, S, S), ``labels`` int64 (B,), uint8 ``image``."""

    x: Tensor
    labels: Tensor
    image: Tensor | None


class Progress(Protocol):
    """Told where a stage is, so that an error can say so."""

    def __call__(self, epoch: int, step: int, activity: str) -> None: ...


@dataclass
class Counters:
    """Sums since the last :meth:`Stage.take_counters`. Seconds of host time; ``errors`` counts wrong test images."""

    busy_s: dict[int, float] = field(default_factory=dict)
    queue_depth_sum: int = 0
    queue_depth_count: int = 0
    steps: int = 0
    images: int = 0
    tested: int = 0
    test_loss_sum: float = 0.0
    wrong: dict[tuple[int, str], Tensor] = field(default_factory=dict)


@dataclass
class _Input:
    """One micro-batch at the entrance of a stage."""

    x: Tensor
    labels: Tensor
    image: Tensor | None
    scale: float
    batch_rows: int
    message: Received | None
    open_modules: int


class Stage:
    """The consecutive local modules of one rank.

    Args:
        modules: in order.
        schedule: the actions of one step.
        gradient_order: gradient messages in the order in which the next stage sends them during one step.
        micro_batches: parts of a batch.
        edges: to the neighbours.
        forward_image: whether a later stage reconstructs the image, so that it must be sent on.
        progress: told the step and the action before each action.
        before_action: called with every action before it runs (fault injection, tracing).
    """

    def __init__(
        self,
        modules: Sequence[LocalModule],
        schedule: Sequence[Action],
        gradient_order: Sequence[Message],
        micro_batches: int,
        edges: Edges,
        forward_image: bool,
        progress: Progress | None = None,
        before_action: Callable[[int, Action], None] | None = None,
    ) -> None:
        self.modules: Mapping[int, LocalModule] = {m.plan.index: m for m in modules}
        self.schedule = tuple(schedule)
        self.edges = edges
        self._first, self._last = min(self.modules), max(self.modules)
        self._gradient_order = tuple(gradient_order)
        self._micro_batches = micro_batches
        self._forward_image = forward_image
        self._progress = progress
        self._before_action = before_action
        self._inputs: dict[int, _Input] = {}
        self._hidden: dict[int, Tensor] = {}
        self._batch: list[_Input] = []
        self._expected: Iterator[Message] = iter(())
        self._arrived: dict[Message, Received] = {}
        self._data_wait_s = 0.0
        self._waited_before_epoch = 0.0
        self.current: Action | None = None
        self.counters = Counters()

    # --- training -----------------------------------------------------------------------------------------------------

    def train_step(self, epoch: int, step: int, batch: Batch | None) -> None:
        """One step of the schedule. ``batch`` is given to the first stage and None elsewhere."""
        self._batch = [] if batch is None else list(self._split(batch))
        self._expected = iter(self._gradient_order)
        for action in self.schedule:
            self.current = action
            if self._progress is not None:
                self._progress(epoch, step, str(action))
            if self._before_action is not None:
                self._before_action(step, action)
            waited, started = self.wait_s(), time.perf_counter()
            self._act(action, epoch, step)
            elapsed = time.perf_counter() - started - (self.wait_s() - waited)
            self.counters.busy_s[action.module] = self.counters.busy_s.get(action.module, 0.0) + elapsed
        self.current = None
        self.counters.steps += 1
        assert not self._inputs and not self._hidden and not self._arrived

    def _act(self, action: Action, epoch: int, step: int) -> None:
        module = self.modules[action.module]
        micro_batch = action.micro_batch
        for message in messages_needed(action, module.plan):
            if message in self._arrived or action.module != self._last:
                continue
            self._await_gradient(message, epoch, step)
        match action.kind:
            case Kind.FORWARD:
                self._forward(module, micro_batch, epoch, step)
            case Kind.CASCADE:
                module.cascade(micro_batch)
            case Kind.INDEPENDENT:
                module.independent(micro_batch)
            case Kind.FINAL:
                module.final(micro_batch)
            case Kind.RELAY:
                assert action.key is not None
                self._send_upstream(action, module.relay(micro_batch, action.key), epoch, step)
            case Kind.BACKWARD:
                upstream = module.backward(micro_batch)
                if upstream is not None:
                    self._send_upstream(action, upstream, epoch, step)
                self._close(micro_batch, action.module)
            case Kind.UPDATE:
                module.update()

    def _split(self, batch: Batch) -> Iterator[_Input]:
        rows = len(batch.labels)
        start = 0
        for part in torch.tensor_split(torch.arange(rows), self._micro_batches):
            span = slice(start, start + len(part))
            start += len(part)
            image = batch.image[span] if batch.image is not None else None
            yield _Input(
                batch.x[span], batch.labels[span], image, len(part) / rows, rows, None, len(self.modules)
            )

    def _forward(self, module: LocalModule, micro_batch: int, epoch: int, step: int) -> None:
        index = module.plan.index
        if index == self._first:
            self._inputs[micro_batch] = self._next_input(micro_batch, epoch, step)
        item = self._inputs[micro_batch]
        x = item.x if index == self._first else self._hidden.pop(micro_batch)
        h = module.forward(micro_batch, x, item.labels, item.image, item.scale, step)
        if index != self._last:
            self._hidden[micro_batch] = h
        elif self.edges.activation_out is not None:
            header = Header(
                MessageKind.TRAIN,
                epoch=epoch,
                step=step,
                micro_batch=micro_batch,
                rows=len(item.labels),
                batch_rows=item.batch_rows,
            )
            self.edges.activation_out.send(header, **self._payload(h, item.labels, item.image))

    def _payload(self, h: Tensor, labels: Tensor, image: Tensor | None) -> dict[str, Tensor]:
        payload = {"activation": h, "labels": labels}
        if self._forward_image:
            assert image is not None
            payload["image"] = image
        return payload

    def _next_input(self, micro_batch: int, epoch: int, step: int) -> _Input:
        receiver = self.edges.activation_in
        if receiver is None:
            item = self._batch[micro_batch]
            self.counters.images += len(item.labels)
            return item
        self._note_depth(receiver)
        message = receiver.take(MessageKind.TRAIN, epoch=epoch, step=step, micro_batch=micro_batch)
        header, fields = message.header, message.fields
        self.counters.images += header.rows
        return _Input(
            fields["activation"],
            fields["labels"],
            fields.get("image"),
            header.rows / header.batch_rows,
            header.batch_rows,
            message,
            len(self.modules),
        )

    def _await_gradient(self, wanted: Message, epoch: int, step: int) -> None:
        """Take messages in the order in which they were sent until the wanted one is here."""
        receiver = self.edges.gradient_in
        assert receiver is not None
        while wanted not in self._arrived:
            module, micro_batch, key = expected = next(self._expected)
            message = receiver.take(MessageKind.GRADIENT, epoch=epoch, step=step, micro_batch=micro_batch, key=key)
            self._arrived[expected] = message
            self.modules[module].receive(micro_batch, key, message.fields["gradient"])

    def _send_upstream(self, action: Action, gradient: Tensor, epoch: int, step: int) -> None:
        for module, micro_batch, key in messages_sent(action):
            if module in self.modules:
                self.modules[module].receive(micro_batch, key, gradient)
                continue
            assert self.edges.gradient_out is not None
            header = Header(
                MessageKind.GRADIENT,
                epoch=epoch,
                step=step,
                micro_batch=micro_batch,
                key=key,
                rows=len(gradient),
                batch_rows=self._inputs[micro_batch].batch_rows,
            )
            self.edges.gradient_out.send(header, gradient=gradient)

    def _close(self, micro_batch: int, module: int) -> None:
        """Give buffers back: gradients once their module has used them, the input once every module is done."""
        for message in [m for m in self._arrived if m[:2] == (module, micro_batch)]:
            self._arrived.pop(message).release()
        item = self._inputs[micro_batch]
        item.open_modules -= 1
        if item.open_modules == 0:
            del self._inputs[micro_batch]
            if item.message is not None:
                item.message.release()

    def _note_depth(self, receiver: Receiver) -> None:
        self.counters.queue_depth_sum += receiver.queue_depth()
        self.counters.queue_depth_count += 1

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def test_step(self, epoch: int, step: int, batch: Batch | None) -> None:
        """Forward one test batch (given to the first stage) and count the errors of every head on the way."""
        message: Received | None = None
        if batch is not None:
            x, labels = batch.x, batch.labels
        else:
            assert self.edges.activation_in is not None
            message = self.edges.activation_in.take(MessageKind.EVAL, epoch=epoch, step=step, micro_batch=0)
            x, labels = message.fields["activation"], message.fields["labels"]
        if self._progress is not None:
            self._progress(epoch, step, "test")
        for index, module in self.modules.items():
            x, scores = module.evaluate(x)
            for level, logits in scores.items():
                wrong = (logits.argmax(dim=1) != labels).sum()
                self.counters.wrong[index, level] = self.counters.wrong.get((index, level), 0) + wrong
        if self.edges.activation_out is not None:
            rows = len(labels)
            header = Header(MessageKind.EVAL, epoch=epoch, step=step, micro_batch=0, rows=rows, batch_rows=rows)
            self.edges.activation_out.send(header, activation=x, labels=labels)
        else:
            loss = torch.nn.functional.cross_entropy(x.float(), labels, reduction="sum")
            self.counters.test_loss_sum += float(loss)
        self.counters.tested += len(labels)
        if message is not None:
            message.release()

    # --- waiting and counting -----------------------------------------------------------------------------------------

    def fetch(self, batches: Iterator[Batch], what: str) -> Batch:
        """The next batch of the first stage; the time until it is there counts as waiting.

        Raises:
            DataError: there are fewer batches than were announced.
        """
        started = time.perf_counter()
        try:
            return next(batches)
        except StopIteration:
            raise DataError(f"the data ended in the middle of {what}: fewer batches than len() had announced") from None
        finally:
            self._data_wait_s += time.perf_counter() - started

    def receivers(self) -> list[Receiver]:
        """The incoming edges."""
        return [edge for edge in (self.edges.activation_in, self.edges.gradient_in) if edge is not None]

    def senders(self) -> list[Sender]:
        """The outgoing edges."""
        return [edge for edge in (self.edges.activation_out, self.edges.gradient_out) if edge is not None]

    def wait_s(self) -> float:
        """Seconds spent waiting for neighbours and data so far."""
        return self._data_wait_s + sum(edge.wait_s for edge in (*self.receivers(), *self.senders()))

    def begin_epoch(self) -> float:
        """Mark the start of an epoch for :meth:`wait_since_epoch`; returns :meth:`wait_s`."""
        self._waited_before_epoch = self.wait_s()
        return self._waited_before_epoch

    def wait_since_epoch(self) -> float:
        """Seconds spent waiting since :meth:`begin_epoch`."""
        return self.wait_s() - self._waited_before_epoch

    def take_counters(self) -> Counters:
        """The counters since the last call."""
        taken, self.counters = self.counters, Counters()
        return taken
