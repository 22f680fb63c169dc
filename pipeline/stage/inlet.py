"""Where a stage gets its input from: the data, the previous stage, or a replay ring. All behind one interface.

    DataInlet   source --> batch --> micro-batches        the first stage; it also says what all stages do after a step
    EdgeInlet   edge from the previous stage              one message a micro-batch
    RingInlet   edge --> ring of the newest batches       schedule `free` (asynchronous DGL, Belilovsky et al. 2020)

With `free` nobody waits, so the stages are at no common step: every stage numbers its own, and an epoch ends everywhere
when the first stage has seen all its data and its mark has come, behind the last batch:

    stage 0   b0 b1 b2 b3 b4 b5 ... |mark            a step on every batch of the data
    stage 1   b0 b0 b1 b2 b2 b3 ... ....|mark        faster: trains again on what is in its ring
    stage 2   b0    b2    b4    ... ....|mark        slower: batches pass it by
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.base.errors import DataError
from pipeline.base.flow import MAIN, Flow, Tensors, named
from pipeline.edges.replay import ReplayCounts, ReplayReceiver
from pipeline.edges.transport import Received, Receiver
from pipeline.edges.wire import Directive, MessageKind
from pipeline.local.micro_batch import MicroBatch
from pipeline.stage.watch import Progress

T = TypeVar("T")
ACTIVATION, LABELS, IMAGE, LOCAL_GRADIENT = "activation", "labels", "image", "local_gradient"
"""Fields of a message downstream; tensors other than "x" are called ``activation.<name>``."""


@dataclass(frozen=True)
class Batch:
    """A whole batch at the first stage: ``x`` (B, ...), or a dict of named tensors, in the form that the network eats;
    ``labels`` int64 (B, ...); ``image`` uint8 (B, C, H, W), where there is one to reconstruct; ``local_gradient`` like
    ``x``, where a stage by itself is given what the module before would have sent. ``all_rows``: of the batch that this
    one is a replica's share of; 0: it is whole."""

    x: Flow
    labels: Tensor
    image: Tensor | None
    local_gradient: Tensor | None = None
    all_rows: int = 0


@dataclass(frozen=True)
class Input:
    """One micro-batch at the entrance of a stage.

    Attributes:
        batch: what the modules get.
        batch_rows: rows of the whole batch, over all replicas.
        release: gives its buffers back.
    """

    batch: MicroBatch
    batch_rows: int
    release: Callable[[], None] = lambda: None

    @property
    def rows(self) -> int:
        """Rows of this micro-batch."""
        return len(self.batch.labels)


class Feed(Protocol):
    """Batches of the data, as of :class:`pipeline.data.source.Source`."""

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...

    def test(self) -> Iterator[Batch]: ...


class Orders(Protocol):
    """What all stages are to do, as of :class:`pipeline.run.orders.SaveOrStop`."""

    def after(self, step: int) -> Directive: ...

    def during_test(self) -> Directive: ...


class Inlet:
    """Base of all inlets: without anything to wait for, replay or order.

    Attributes:
        directive: what all stages are to do after the step at work.
    """

    directive = Directive.GO

    @property
    def wait_s(self) -> float:
        """Seconds that this stage has waited for input."""
        return 0.0

    def steps(self, epoch: int, first: int, began: int, end: int) -> Generator[int, None, None]:
        """The number of every step to do in an epoch of the steps ``first`` .. ``end`` - 1 of the first stage, of which
        those before ``began`` are done. Close it when the epoch is left early."""
        yield from range(began, end)

    def next(self, epoch: int, step: int, micro_batch: int) -> Input:
        """The next micro-batch, which must be this one."""
        raise NotImplementedError

    def end_epoch(self, epoch: int, end: int) -> int:
        """The step before which the first stage has ended the epoch."""
        return end

    def tests(self, epoch: int, step: int, count: int) -> Generator[int, None, None]:
        """A number for each of the ``count`` batches of a test, from ``step`` on. Close it when left early."""
        yield from range(step, step + count)

    def next_test(self, epoch: int, step: int) -> Input:
        """The next test batch."""
        raise NotImplementedError

    def depth(self) -> int | None:
        """Messages that have arrived and are not taken yet; None where none arrive."""
        return None

    def take_counts(self) -> ReplayCounts:
        """Of a replay ring, since the last call."""
        return ReplayCounts()


class BatchInlet(Inlet):
    """The batch that it holds, in every step: for a stage by itself, measured or tested."""

    def __init__(self, batch: Batch | None = None, micro_batches: int = 1) -> None:
        self.batch = batch
        self._micro_batches = micro_batches

    def next(self, epoch: int, step: int, micro_batch: int) -> Input:
        assert self.batch is not None
        return list(split(self.batch, self._micro_batches))[micro_batch]

    def next_test(self, epoch: int, step: int) -> Input:
        assert self.batch is not None
        return next(split(self.batch, 1))


class DataInlet(Inlet):
    """The input of the first stage.

    Args:
        feed: where batches come from.
        micro_batches: parts of a batch.
        orders: asked before every step.
        at_epoch_end: orders wait for the end of the epoch, which STOP makes the next step (`free`: before it the stages
            are at no common step).
        progress: told when a batch is read.
    """

    wait_s = 0.0

    def __init__(
        self,
        feed: Feed,
        micro_batches: int,
        orders: Orders,
        at_epoch_end: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._feed = feed
        self._micro_batches = micro_batches
        self._orders = orders
        self._at_epoch_end = at_epoch_end
        self._held = Directive.GO
        self._ended_at = 0
        self._progress = progress
        self._parts: list[Input] = []

    def steps(self, epoch: int, first: int, began: int, end: int) -> Generator[int, None, None]:
        self._held, self._ended_at = Directive.GO, began
        batches = self._feed.train(epoch, began - first)
        try:
            for step in range(began, end):
                if self._held is Directive.STOP:
                    return
                self._parts = list(split(self._read(batches, epoch, step, f"epoch {epoch}"), self._micro_batches))
                self._obey(self._orders.after(step + 1))
                self._ended_at = step + 1
                yield step
        finally:
            _close(batches)

    def next(self, epoch: int, step: int, micro_batch: int) -> Input:
        return self._parts[micro_batch]

    def end_epoch(self, epoch: int, end: int) -> int:
        if not self._at_epoch_end:
            return end
        self.directive = self._held
        return self._ended_at

    def tests(self, epoch: int, step: int, count: int) -> Generator[int, None, None]:
        batches = self._feed.test()
        try:
            for number in range(step, step + count):
                self._parts = list(split(self._read(batches, epoch, step, "the test"), 1))
                self.directive = self._orders.during_test()
                yield number
        finally:
            _close(batches)

    def next_test(self, epoch: int, step: int) -> Input:
        return self._parts[0]

    def _obey(self, order: Directive) -> None:
        if self._at_epoch_end:
            self._held = max(self._held, order)
            order = Directive.GO
        self.directive = order

    def _read(self, batches: Iterator[Batch], epoch: int, step: int, what: str) -> Batch:
        """The next batch; the time until it is there counts as waiting.

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
            self.wait_s += time.perf_counter() - started


class EdgeInlet(Inlet):
    """The input of a stage behind another one, from the edge between them."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    @property
    def wait_s(self) -> float:
        return self._receiver.wait_s

    def next(self, epoch: int, step: int, micro_batch: int) -> Input:
        return self._taken(MessageKind.TRAIN, epoch, step, micro_batch)

    def next_test(self, epoch: int, step: int) -> Input:
        return self._taken(MessageKind.EVAL, epoch, step, 0)

    def depth(self) -> int:
        return self._receiver.queue_depth()

    def _taken(self, kind: MessageKind, epoch: int, step: int, micro_batch: int) -> Input:
        message = self._receiver.take(kind, epoch=epoch, step=step, micro_batch=micro_batch)
        self.directive = message.header.directive
        return received_input(message)


class RingInlet(EdgeInlet):
    """The input of a stage of schedule `free`. Its steps per epoch may be more or fewer than the first stage's."""

    def __init__(self, receiver: ReplayReceiver) -> None:
        super().__init__(receiver)
        self._ring = receiver
        self._next_step = 0

    def steps(self, epoch: int, first: int, began: int, end: int) -> Generator[int, None, None]:
        self._next_step = max(self._next_step, began)
        started = False
        while self._ring.ready(epoch, started):
            started = True
            self._next_step += 1
            yield self._next_step - 1

    def next(self, epoch: int, step: int, micro_batch: int) -> Input:
        return received_input(self._ring.read())

    def end_epoch(self, epoch: int, end: int) -> int:
        mark = self._ring.take_mark(epoch)
        self.directive = mark.directive
        return mark.step

    def take_counts(self) -> ReplayCounts:
        return self._ring.take_counts()


def edge_inlet(receiver: Receiver) -> EdgeInlet:
    """The inlet of a stage with this end of the edge from the previous one."""
    return RingInlet(receiver) if isinstance(receiver, ReplayReceiver) else EdgeInlet(receiver)


def split(batch: Batch, parts: int) -> Iterator[Input]:
    """A batch cut into micro-batches of as equal sizes as can be."""
    rows, start = len(batch.labels), 0
    every = batch.all_rows or rows
    tensors = named(batch.x)
    for part in torch.tensor_split(torch.arange(rows), parts):
        span = slice(start, start + len(part))
        start += len(part)
        image = batch.image[span] if batch.image is not None else None
        inputs = {name: tensor[span] for name, tensor in tensors.items()}
        asked = batch.local_gradient[span] if batch.local_gradient is not None else None
        yield Input(MicroBatch(inputs, batch.labels[span], image, len(part) / every, asked), every)


def payload(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The fields of a message that carry a named set, tensors or what is known of them: "x" under the prefix alone,
    others as ``prefix.name``."""
    return {prefix if name == MAIN else f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def carried(fields: Tensors, prefix: str) -> Tensors:
    """The inverse of :func:`payload`; fields of other things are left out."""
    start = f"{prefix}."
    return {
        MAIN if name == prefix else name.removeprefix(start): tensor
        for name, tensor in fields.items()
        if name == prefix or name.startswith(start)
    }


def received_input(message: Received) -> Input:
    """The micro-batch that a message from the previous stage carries."""
    header, fields = message.header, message.fields
    share = header.rows / header.batch_rows
    activations, asked = carried(fields, ACTIVATION), fields.get(LOCAL_GRADIENT)
    batch = MicroBatch(activations, fields[LABELS], fields.get(IMAGE), share, asked)
    return Input(batch, header.batch_rows, message.release)


def _close(batches: Any) -> None:
    close = getattr(batches, "close", None)  # ends the loader's thread when an epoch is cut short
    if close is not None:
        close()
