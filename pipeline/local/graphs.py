"""CUDA graphs: the kernels of each action of a local module, captured once and launched together from then on.

    batch 0 1 2   enter, forward, cascade, relay, independent, backward     eager, which warms up
    batch 3       the same, each captured as a graph and then launched
    batch 4 ...   copy into the static buffers | F | C | R --> send | I | receive --> copy | B     one launch for each

Messages, updates and what a checkpoint copies stay outside: they work on the static buffers of a graph as on any other
tensor. A graph is made for one place of a batch, its micro-batch and (schedule `async`) the stash of weights that it
uses: so the buffers of a batch in flight are written by no other one. The graphs of all modules of a rank whose batches
end within their step share memory, as they do without graphs: they are launched in the order in which they were
captured. A late module has memory of its own for each place.

What a graph does not see again is Python: a number, a branch or a counter is what it was when the graph was captured.
The step of a batch, which a head might look at, is hidden from it then, so that such a head has no graph. Random
numbers are seeded before each launch, as before each eager action, so they are the same.

A module whose action cannot be captured goes on without graphs, and so does a batch of another shape; that is said on
one line. The weights are those of the eager run to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pipeline.base.errors import ConfigError, warn
from pipeline.base.flow import Tensors
from pipeline.local.micro_batch import BatchKey, InFlight, MicroBatch
from pipeline.local.stashes import Stash

T = TypeVar("T")
Work = Callable[[BatchKey], T]
"""What an action does with the micro-batch in flight under a key."""
WARM_UP = 3
"""Batches of every place before the one that is captured: kernels are loaded, plans of libraries made, memory grown."""
FORWARD, BACKWARD = "forward", "backward"
_SAID = ("outputs", "own", "independent", "relayed", "local_gradient", "aux", "embedding")
"""What actions leave in an InFlight."""


class Eagerly:
    """Does every action when it is asked for."""

    def enter(self, key: BatchKey, batch: MicroBatch, stash: Stash | None) -> MicroBatch:
        """The micro-batch as the module is to keep it; its forward comes next."""
        return batch

    def received(self, key: BatchKey, message: int, gradients: Tensors) -> Tensors:
        """Gradients from module m+1, likewise."""
        return gradients

    def run(self, key: BatchKey, name: str, work: Work[T]) -> T:
        """Do the action ``name``."""
        return work(key)

    def lasting(self, losses: Tensors) -> Tensors:
        """What an action returned, in memory that the next one leaves alone."""
        return losses

    def shown(self, step: int) -> int:
        """The step of a batch, as heads see it."""
        return step


class Capture:
    """Where the modules of a rank capture: one stream, and memory that they share.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.shared = self.own_pool()
        self.told_of_shapes = False

    @staticmethod
    def own_pool() -> Any:
        """Memory for graphs that share it with no others."""
        return torch.cuda.graph_pool_handle()

    def graph(self, pool: Any, work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """What ``work`` launches, as a graph, not launched yet; and what it returns, whose values come with the launch.

        No wait for the device, as :class:`torch.cuda.graph` has: a message may be under way. Other threads may do with
        the device what they like.

        Raises:
            RuntimeError: it did something that no graph can hold; or whatever ``work`` raises.
        """
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream), _uncollected():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                found = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # that it is invalid
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, found


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, nothing is freed by chance, as another graph might be."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@dataclass
class _Graph:
    """One action: its graph, what it returned, what it left in the InFlight, and in ``.grad`` of which leaves (leaf,
    gradient before, gradient after)."""

    graph: torch.cuda.CUDAGraph
    found: Any
    said: dict[str, Any]
    gradients: list[tuple[Tensor, Tensor | None, Tensor]]


@dataclass
class _Place:
    """A micro-batch in buffers that stay where they are, and the graphs that work on them."""

    form: object
    frozen: object
    batch: MicroBatch
    stash: Stash | None
    pool: Any
    received: dict[int, Tensors] = field(default_factory=dict)
    graphs: dict[str, _Graph] = field(default_factory=dict)


class Graphs(Eagerly):
    """Captures and launches the actions of one local module.

    Args:
        name: of the module, for a line.
        capture: of its rank.
        in_flight: of the module.
        trained: parameters of the module and its heads.
        again: runs the forward of a micro-batch in flight once more, as it was, and leaves no trace but its graph of
            autograd.
        frozen: what else a graph would keep, which is captured anew where it has changed.
        late: whether batches are in flight from one step to the next.
        image: whether its heads see the image.
    """

    def __init__(
        self,
        name: str,
        capture: Capture,
        in_flight: dict[BatchKey, InFlight],
        trained: Sequence[Tensor],
        again: Callable[[BatchKey], object],
        frozen: Callable[[], object],
        late: bool,
        image: bool,
    ) -> None:
        self._name = name
        self._capture = capture
        self._in_flight = in_flight
        self._trained = trained
        self._again = again
        self._frozen = frozen
        self._late = late
        self._image = image
        self._seen: Counter[object] = Counter()
        self._places: dict[tuple[int, int], _Place] = {}
        self._at_work: dict[BatchKey, _Place] = {}
        self._alone = late
        self._gave_up = False
        self._capturing = False

    def enter(self, key: BatchKey, batch: MicroBatch, stash: Stash | None) -> MicroBatch:
        if self._gave_up:
            return self._own(batch)
        batch = batch if self._image else replace(batch, image=None)
        where, form, frozen = (key[1], id(stash)), _form(batch), self._frozen()
        place = self._places.get(where)
        if place is not None and place.frozen != frozen:
            del self._places[where]
            self._seen.clear()
            self._alone, place = True, None  # the others have been captured in the order of a step, without it
        if place is None:
            self._seen[where, form] += 1
            if self._seen[where, form] <= WARM_UP:
                return self._own(batch)
            pool = self._capture.own_pool() if self._alone else self._capture.shared
            place = self._places[where] = _Place(form, frozen, _buffers(batch), stash, pool)
        elif place.form != form:
            self._tell_of_shapes(_rows(batch), _rows(place.batch))
            return self._own(batch)
        _copy(_tensors(place.batch), _tensors(batch))
        self._at_work[key] = place
        return place.batch

    def received(self, key: BatchKey, message: int, gradients: Tensors) -> Tensors:
        place = self._at_work.get(key)
        if place is None:
            return {name: value.clone() for name, value in gradients.items()} if self._late else gradients
        if message not in place.received:
            place.received[message] = {name: torch.empty_like(value) for name, value in gradients.items()}
        _copy(list(place.received[message].values()), list(gradients.values()))
        return place.received[message]

    def run(self, key: BatchKey, name: str, work: Work[T]) -> T:
        place = self._at_work.get(key)
        graph = place.graphs.get(name) if place is not None else None
        if place is None or (graph is None and self._gave_up):
            found = work(key)
        elif graph is None:
            found = self._captured(place, key, name, work)
        else:
            _launch(graph)
            vars(self._in_flight[key]).update(graph.said)
            found = graph.found
        if name == BACKWARD:
            self._in_flight.pop(key, None)
            self._at_work.pop(key, None)
        return found

    def _own(self, batch: MicroBatch) -> MicroBatch:
        """Of a late module without a graph for it: the inputs may be another module's buffers, for the next batch too
        before this one ends."""
        if not self._late:
            return batch
        inputs = {n: x.detach().clone().requires_grad_(x.requires_grad) for n, x in batch.inputs.items()}
        return replace(batch, inputs=inputs)

    def lasting(self, losses: Tensors) -> Tensors:
        values = list(losses.values())
        return dict(zip(losses, torch._foreach_mul(values, 1.0), strict=True)) if values else losses

    def shown(self, step: int) -> int:
        return cast(int, _HiddenStep()) if self._capturing else step

    def give_up(self, why: str) -> None:
        """Make no more graphs, and say so; batches in flight end as they have begun."""
        if not self._gave_up:
            self._gave_up = True
            warn(f"{self._name} works without CUDA graphs: {why}")

    def _captured(self, place: _Place, key: BatchKey, name: str, work: Work[T]) -> T:
        item = self._in_flight[key]
        leaves = list({id(leaf): leaf for leaf in (*self._trained, *item.weights)}.values())
        before = [(leaf.grad, leaf.grad._version if leaf.grad is not None else 0) for leaf in leaves]
        kept = copy.copy(item)
        self._capturing = True
        try:
            graph, found = self._capture.graph(place.pool, lambda: work(key))
        except Exception as error:
            self._capturing = False
            for leaf, (gradient, _) in zip(leaves, before, strict=True):
                leaf.grad = gradient
            self._in_flight[key] = kept
            self.give_up(f"its {name} cannot be captured ({' '.join(str(error).split())[:200]})")
            if name == BACKWARD:  # it may have freed a part of what it needs
                self._again(key)
            return work(key)
        self._capturing = False
        graph.replay()
        gradients = [
            (leaf, gradient, leaf.grad)
            for leaf, (gradient, version) in zip(leaves, before, strict=True)
            if leaf.grad is not None and (leaf.grad is not gradient or leaf.grad._version != version)
        ]
        place.graphs[name] = _Graph(graph, found, {each: getattr(item, each) for each in _SAID}, gradients)
        if name == BACKWARD:
            for each in place.graphs.values():  # what is used up is free for the graphs that come after
                del each.said["outputs"]
                if not self._late:  # else a checkpoint may come before the backward
                    del each.said["own"], each.said["independent"], each.said["aux"]
                    del each.said["embedding"]
        return found

    def _tell_of_shapes(self, rows: int, captured: int) -> None:
        if not self._capture.told_of_shapes:
            self._capture.told_of_shapes = True
            warn(
                f"{self._name} works without CUDA graphs on batches of other shapes than those it began with "
                f"({rows} rows in a batch, not {captured}), and so do the others of this rank"
            )


@torch.no_grad()
def _launch(graph: _Graph) -> None:
    """The gradients end up in ``.grad`` as after the same backward without a graph, whatever was there."""
    earlier = []
    for leaf, before, after in graph.gradients:
        now = leaf.grad
        if before is None and now is not None:
            earlier.append((after, now.clone() if now is after else now))
        elif before is not None and now is not before:
            if now is None:
                before.zero_()
            else:
                before.copy_(now)
    graph.graph.replay()
    for leaf, _, after in graph.gradients:
        leaf.grad = after
    for after, gradient in earlier:
        after.add_(gradient)


def _tensors(batch: MicroBatch) -> list[Tensor]:
    others = (batch.labels, batch.image, batch.local_gradient)
    return [*batch.inputs.values(), *(tensor for tensor in others if tensor is not None)]


def _rows(batch: MicroBatch) -> int:
    """Of the whole batch."""
    return round(len(batch.labels) / batch.scale)


def _form(batch: MicroBatch) -> object:
    """What is frozen in a graph of it."""
    tensors = {"labels": batch.labels, "image": batch.image, "local_gradient": batch.local_gradient}
    tensors |= {f"x.{name}": x for name, x in batch.inputs.items()}
    shapes = [(n, x.shape, x.stride(), x.dtype, x.requires_grad) for n, x in tensors.items() if x is not None]
    return batch.scale, tuple(shapes)


def _buffers(batch: MicroBatch) -> MicroBatch:
    """Tensors like those of a batch; inputs that require grad do so too."""
    return replace(
        batch,
        inputs={name: torch.empty_like(x).requires_grad_(x.requires_grad) for name, x in batch.inputs.items()},
        labels=torch.empty_like(batch.labels),
        image=None if batch.image is None else torch.empty_like(batch.image),
        local_gradient=None if batch.local_gradient is None else torch.empty_like(batch.local_gradient),
    )


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.detach().copy_(source)


class _HiddenStep:
    """In place of the step of a batch while a graph is captured, which would keep that one for ever."""

    def _refuse(self, *_: object) -> Any:
        raise ConfigError("a head looks at the step of its batch")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __index__ = __int__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = __truediv__ = _refuse
    __hash__ = __str__ = __format__ = _refuse


def refuse_without_gpu(device: torch.device) -> None:
    """Graphs are of a GPU's kernels.

    Raises:
        ConfigError: ``device`` is none.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"precision.cuda_graphs = true, but this run computes on the {device.type.upper()}; use a GPU "
            "(runtime.device=cuda) or precision.cuda_graphs=false"
        )
