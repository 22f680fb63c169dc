"""One rank: runs its schedule over its local modules and its edges.

                 activation, labels (, image)
    stage r-1  ------------------------------>  stage r  ------------------------------>  stage r+1
               <------------------------------           <------------------------------
                 gradient, one per key of the hierarchy; only where a cascade crosses the edge

An epoch is ``begin_epoch``, ``train_step`` for every batch, ``end_epoch``, which does the work that schedule `async`
has left late. The stage knows nothing of files or screens. Everything it waits for has a deadline (see transport).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.base.errors import DataError, NonFiniteError
from pipeline.edges.connect import Edges
from pipeline.edges.transport import Received, Receiver, Sender
from pipeline.edges.wire import Directive, Header, MessageKind
from pipeline.local.local_module import BatchKey, LocalModule
from pipeline.stage.recorder import Recorder
from pipeline.stage.schedule import Action, Kind, Message, late_steps, messages_needed, messages_sent


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
    """Sums since the last :meth:`Stage.take_counters`. Seconds of host time; ``wrong`` counts wrong test images;
    ``reused``, ``skipped`` and ``held_back`` as in :class:`pipeline.edges.replay.ReplayCounts`."""

    busy_s: dict[int, float] = field(default_factory=dict)
    queue_depth_sum: int = 0
    queue_depth_count: int = 0
    steps: int = 0
    images: int = 0
    tested: int = 0
    test_loss_sum: float = 0.0
    wrong: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    reused: int = 0
    skipped: int = 0
    held_back: int = 0


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
        gradient_order: (lag, message) of the gradients that the next stage sends during one step, in its order.
        micro_batches: parts of a batch.
        edges: to the neighbours.
        forward_image: whether a later stage reconstructs the image, so that it must be sent on.
        progress: told the step and the action before each action.
        before_action: called with every action before it runs (fault injection, measuring).
        recorder: told what ran from when to when.
    """

    def __init__(
        self,
        modules: Sequence[LocalModule],
        schedule: Sequence[Action],
        gradient_order: Sequence[tuple[int, Message]],
        micro_batches: int,
        edges: Edges,
        forward_image: bool,
        progress: Progress | None = None,
        before_action: Callable[[int, Action], None] | None = None,
        recorder: Recorder | None = None,
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
        self._recorder = recorder
        self._inputs: dict[BatchKey, _Input] = {}
        self._hidden: dict[BatchKey, Tensor] = {}
        self._batch: list[_Input] = []
        self._sender_step = 0  # the next stage's step of the next gradient in line, and its place in that step
        self._sender_place = 0
        self._arrived: dict[tuple[int, Message], Received | None] = {}  # None: restored, there is no message to release
        self._first_step = 0
        self._end_step: int | None = None
        self._data_wait_s = 0.0
        self._waited_before_epoch = 0.0
        self.directive = Directive.GO  # of the last step
        self.current: Action | None = None
        self.counters = Counters()

    @property
    def late_since(self) -> int:
        """The first step whose late work may be open."""
        return self._first_step

    # --- training -----------------------------------------------------------------------------------------------------

    def begin_epoch(self, first_step: int, resumed_at: int | None = None) -> None:
        """Start an epoch whose batches are numbered from ``first_step``; its next step is ``resumed_at``, if given."""
        self._first_step, self._end_step = first_step, None
        self._sender_step, self._sender_place = first_step if resumed_at is None else resumed_at, 0
        self._waited_before_epoch = self.wait_s()

    def more_steps(self, epoch: int, done: int, planned: int) -> bool:
        """Whether ``epoch``, with ``done`` of ``planned`` steps done here, needs another."""
        return done < planned

    def train_step(
        self, epoch: int, step: int, batch: Batch | None, directive: Directive = Directive.GO
    ) -> None:
        """One step of the schedule. ``batch`` and ``directive`` are given to the first stage; the others find both in
        their messages, the latter then in ``self.directive``."""
        self._batch = [] if batch is None else list(self._split(batch))
        self.directive = directive
        self._run(epoch, step, [action for action in self.schedule if step - action.lag >= self._first_step])
        self.counters.steps += 1

    def end_epoch(self, epoch: int, end_step: int) -> None:
        """Do what is left late, so that the weights hold every batch before ``end_step``."""
        self._end_step = end_step
        for step, actions in late_steps(self.schedule, self._first_step, end_step):
            self._run(epoch, step, actions)
        assert not self._inputs and not self._hidden and not self._arrived

    def catch_up(self, epoch: int, step: int) -> None:
        """Take every gradient that the next stage sends up to the end of its ``step``, so that between two steps all
        that is on its way to this stage is in this stage. Only late work leaves any."""
        if not self._gradient_order:
            return
        while self._sender_step <= step:
            self._take_gradient(epoch)

    def restored(self) -> None:
        """The modules hold batches that a checkpoint had in flight: take them on, with no message to give back."""
        for module in self.modules.values():
            for key, item in module.in_flight.items():
                batch_rows = round(len(item.labels) / item.scale)
                held = self._inputs.setdefault(
                    key, _Input(item.x, item.labels, item.image, item.scale, batch_rows, None, 0)
                )
                held.open_modules += 1
                for message_key in item.received if module.plan.index == self._last else ():
                    self._arrived[key[0], (self._last, key[1], message_key)] = None

    def _run(self, epoch: int, step: int, actions: Sequence[Action]) -> None:
        for action in actions:
            self.current = action
            batch_step = step - action.lag
            if self._progress is not None:
                self._progress(epoch, batch_step, str(action))
            if self._before_action is not None:
                self._before_action(batch_step, action)
            arrived = self._mark()
            self._fetch_for(action, epoch, batch_step)
            waited, started, mark = self.wait_s(), time.perf_counter(), self._mark()
            self._act(action, epoch, batch_step)
            blocked = self.wait_s() - waited  # for room in the queue of a message
            elapsed = time.perf_counter() - started - blocked
            self.counters.busy_s[action.module] = self.counters.busy_s.get(action.module, 0.0) + elapsed
            if self._recorder is not None:
                self._recorder.action(action, batch_step, arrived, mark, blocked)
        self.current = None

    def _mark(self) -> Any:
        return self._recorder.mark() if self._recorder is not None else None

    def _fetch_for(self, action: Action, epoch: int, step: int) -> None:
        """Wait for the messages that an action needs."""
        for message in messages_needed(action, self.modules[action.module].plan):
            if action.module == self._last and (step, message) not in self._arrived:
                self._await_gradient((step, message), epoch)
        if action.kind is Kind.FORWARD and action.module == self._first:
            self._inputs[step, action.micro_batch] = self._next_input(action.micro_batch, epoch, step)

    def _act(self, action: Action, epoch: int, step: int) -> None:
        module = self.modules[action.module]
        key = (step, action.micro_batch)
        match action.kind:
            case Kind.FORWARD:
                self._forward(module, key, epoch)
            case Kind.CASCADE:
                module.cascade(key)
            case Kind.INDEPENDENT:
                module.independent(key)
            case Kind.FINAL:
                module.final(key)
            case Kind.RELAY:
                assert action.key is not None
                self._send_upstream(action, module.relay(key, action.key), epoch, step)
            case Kind.BACKWARD:
                upstream = module.backward(key)
                if upstream is not None:
                    self._send_upstream(action, upstream, epoch, step)
                self._close(key, action.module)
            case Kind.UPDATE:
                self._update(module, step)

    def _update(self, module: LocalModule, step: int) -> None:
        try:
            module.update(step)
        except NonFiniteError as error:
            # It may have begun in another module of this stage, whose update comes later.
            others = [other.loss_error(step) for other in self.modules.values()]
            raise min([error, *filter(None, others)], key=lambda each: each.precedence) from None

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

    def _forward(self, module: LocalModule, key: BatchKey, epoch: int) -> None:
        index = module.plan.index
        item = self._inputs[key]
        x = item.x if index == self._first else self._hidden.pop(key)
        h = module.forward(key, x, item.labels, item.image, item.scale)
        if index != self._last:
            self._hidden[key] = h
        elif self.edges.activation_out is not None:
            step, micro_batch = key
            header = Header(
                MessageKind.TRAIN,
                epoch=epoch,
                step=step,
                micro_batch=micro_batch,
                rows=len(item.labels),
                batch_rows=item.batch_rows,
                directive=self.directive,
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
        message = self._take_message(epoch, step, micro_batch)
        header, fields = message.header, message.fields
        self.counters.images += header.rows
        self.directive = header.directive
        return _Input(
            fields["activation"],
            fields["labels"],
            fields.get("image"),
            header.rows / header.batch_rows,
            header.batch_rows,
            message,
            len(self.modules),
        )

    def _take_message(self, epoch: int, step: int, micro_batch: int) -> Received:
        assert self.edges.activation_in is not None
        return self.edges.activation_in.take(MessageKind.TRAIN, epoch=epoch, step=step, micro_batch=micro_batch)

    def _await_gradient(self, wanted: tuple[int, Message], epoch: int) -> None:
        """Take messages in the order in which they were sent until the wanted one is here."""
        while wanted not in self._arrived:
            self._take_gradient(epoch)

    def _take_gradient(self, epoch: int) -> None:
        """Take the gradient that is next in the order in which the next stage sends them, unless its batch is none of
        this epoch."""
        lag, message = self._gradient_order[self._sender_place]
        step = self._sender_step - lag
        self._sender_place += 1
        if self._sender_place == len(self._gradient_order):
            self._sender_step, self._sender_place = self._sender_step + 1, 0
        if step < self._first_step or (self._end_step is not None and step >= self._end_step):
            return
        module, micro_batch, key = message
        assert self.edges.gradient_in is not None
        received = self.edges.gradient_in.take(
            MessageKind.GRADIENT, epoch=epoch, step=step, micro_batch=micro_batch, key=key
        )
        self._arrived[step, message] = received
        self.modules[module].receive((step, micro_batch), key, received.fields["gradient"])

    def _send_upstream(self, action: Action, gradient: Tensor, epoch: int, step: int) -> None:
        for module, micro_batch, key in messages_sent(action):
            if module in self.modules:
                self.modules[module].receive((step, micro_batch), key, gradient)
                continue
            assert self.edges.gradient_out is not None
            header = Header(
                MessageKind.GRADIENT,
                epoch=epoch,
                step=step,
                micro_batch=micro_batch,
                key=key,
                rows=len(gradient),
                batch_rows=self._inputs[step, micro_batch].batch_rows,
            )
            self.edges.gradient_out.send(header, gradient=gradient)

    def _close(self, batch: BatchKey, module: int) -> None:
        """Give buffers back: gradients once their module has used them, the input once every module is done."""
        step, micro_batch = batch
        for key in self.modules[module].plan.incoming:
            received = self._arrived.pop((step, (module, micro_batch, key)), None)
            if received is not None:
                received.release()
        item = self._inputs[batch]
        item.open_modules -= 1
        if item.open_modules == 0:
            del self._inputs[batch]
            if item.message is not None:
                item.message.release()

    def _note_depth(self, receiver: Receiver) -> None:
        self.counters.queue_depth_sum += receiver.queue_depth()
        self.counters.queue_depth_count += 1

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def test_step(
        self, epoch: int, step: int, batch: Batch | None, directive: Directive = Directive.GO
    ) -> None:
        """Forward one test batch and count the errors of every head on the way. Arguments as of ``train_step``."""
        message: Received | None = None
        self.directive = directive
        if batch is not None:
            x, labels = batch.x, batch.labels
        else:
            assert self.edges.activation_in is not None
            message = self.edges.activation_in.take(MessageKind.EVAL, epoch=epoch, step=step, micro_batch=0)
            x, labels = message.fields["activation"], message.fields["labels"]
            self.directive = message.header.directive
        if self._progress is not None:
            self._progress(epoch, step, "test")
        for index, module in self.modules.items():
            x, scores = module.evaluate(x)
            for level, logits in scores.items():
                wrong = (logits.argmax(dim=1) != labels).sum()
                self.counters.wrong[index, level] = self.counters.wrong.get((index, level), 0) + wrong
        if self.edges.activation_out is not None:
            rows = len(labels)
            header = Header(MessageKind.EVAL, epoch, step, 0, 0, rows, rows, self.directive)
            self.edges.activation_out.send(header, activation=x, labels=labels)
        else:
            loss = torch.nn.functional.cross_entropy(x.float(), labels, reduction="sum")
            self.counters.test_loss_sum += float(loss)
        self.counters.tested += len(labels)
        if message is not None:
            message.release()

    # --- waiting and counting -----------------------------------------------------------------------------------------

    def fetch(self, batches: Iterator[Batch], epoch: int, step: int, what: str) -> Batch:
        """The next batch of the first stage; the time until it is there counts as waiting.

        Raises:
            DataError: there are fewer batches than were announced.
        """
        if self._progress is not None:
            self._progress(epoch, step, f"reading a batch of {what}")
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

    def wait_since_epoch(self) -> float:
        """Seconds spent waiting since ``begin_epoch``."""
        return self.wait_s() - self._waited_before_epoch

    def take_counters(self) -> Counters:
        """The counters since the last call."""
        taken, self.counters = self.counters, Counters()
        return taken
