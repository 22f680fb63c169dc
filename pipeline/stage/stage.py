"""One rank: runs its schedule over its local modules and its edges. ``train_step`` is the training step.

                 activation, labels (, image; with SGR the gradient of the local loss)
    stage r-1  ------------------------------>  stage r  ------------------------------>  stage r+1
               <------------------------------           <------------------------------
                 gradient, one per key of the hierarchy; only where a cascade crosses the edge

An epoch is ``begin_epoch``, ``train_step`` for every number that the inlet yields, ``end_epoch``, which does the work
that schedule `async` has left late. The stage knows nothing of files or screens. Everything it waits for has a deadline
(see edges.transport).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.base.errors import NonFiniteError
from pipeline.base.flow import MAIN, Tensors
from pipeline.edges.wire import Directive, Header, MessageKind
from pipeline.local.local_module import LocalModule
from pipeline.local.micro_batch import BatchKey, MicroBatch
from pipeline.local.updates import Due, losses_together, update_rest, update_together
from pipeline.stage.averaging import Averaging
from pipeline.stage.counters import Counters
from pipeline.stage.gradients import GRADIENT, GradientInlet
from pipeline.stage.inlet import ACTIVATION, IMAGE, LABELS, LOCAL_GRADIENT, Inlet, Input, payload
from pipeline.stage.neighbours import Neighbours
from pipeline.stage.schedule import Action, Kind, Message, last_backwards, messages_sent, together
from pipeline.stage.watch import Watch
from pipeline.stage.weights_upstream import WeightsUpstream


class Stage:
    """The consecutive local modules of one rank.

    Args:
        modules: in order.
        schedule: the actions of one step.
        inlet: where its input comes from.
        edges: to the neighbours.
        gradient_order: (lag, message) of the gradients that the next stage sends during one step, in its order.
        forward_image: whether a later stage reconstructs the image, so that it must be sent on.
        marks_epochs: whether the end of an epoch is a message of its own (`free`).
        watch: who looks on.
        averaging: over the replicas, where there are several.
    """

    def __init__(
        self,
        modules: Sequence[LocalModule],
        schedule: Sequence[Action],
        inlet: Inlet,
        edges: Neighbours,
        gradient_order: Sequence[tuple[int, Message]] = (),
        forward_image: bool = False,
        marks_epochs: bool = False,
        watch: Watch | None = None,
        averaging: Averaging | None = None,
    ) -> None:
        self.modules: Mapping[int, LocalModule] = {m.plan.index: m for m in modules}
        self.schedule = tuple(schedule)
        self.inlet = inlet
        self.edges = edges
        self.watch = watch or Watch()
        self.counters = Counters()
        self._first, self._last = min(self.modules), max(self.modules)
        self._gradients = GradientInlet(edges.gradient_in, gradient_order, self.modules)
        self._weights = WeightsUpstream(edges, schedule, self.modules)
        self._last_backwards = last_backwards(schedule)
        self.micro_batches = 1 + max(action.micro_batch for action in schedule)
        self._forward_image = forward_image
        self._marks_epochs = marks_epochs
        self._averaging = averaging
        self._inputs: dict[BatchKey, Input] = {}
        self._unfinished: dict[BatchKey, int] = {}  # modules that still need the input
        self._hidden: dict[BatchKey, tuple[Tensors, Tensor | None]] = {}  # to the next module: outputs, local gradient
        self._held: dict[BatchKey, Tensors] = {}  # output of a module whose heads work first
        self._first_step = 0
        self._end_step: int | None = None  # once the epoch has no more batches
        self._waited_before_epoch = 0.0

    @property
    def directive(self) -> Directive:
        """What all stages are to do after the last step."""
        return self.inlet.directive

    # --- training -----------------------------------------------------------------------------------------------------

    def train_step(self, epoch: int, step: int) -> None:
        """One training step of this rank. The schedule gives the order of the actions, this says what each one is."""
        for actions in together(filter(self._in(step), self.schedule)):
            action = actions[0]
            module, batch = self.modules[action.module], (step - action.lag, action.micro_batch)
            self.watch.reached(actions, epoch, step)
            if action.kind is Kind.FORWARD and action.module == self._first:
                self._take_input(epoch, batch)
            self._gradients.wait_for(action, epoch, batch[0])  # of the next stage, where the action needs any
            self._weights.wait_for(action, epoch, batch[0])  # likewise
            with self.watch.working(actions, step, self.wait_s):
                match action.kind:
                    case Kind.FORWARD:
                        h = module.forward(batch, self._given(module, batch))
                        self._pass_on(module, batch, h, epoch)
                    case Kind.CASCADE:
                        module.cascade(batch)
                    case Kind.RELAY:
                        assert action.key is not None
                        self._send_upstream(action, batch, module.relay(batch, action.key), epoch)
                    case Kind.INDEPENDENT:
                        module.independent(batch)
                        self._pass_on_late(module, batch, epoch)
                    case Kind.FINAL:
                        module.final(batch)
                    case Kind.BACKWARD:
                        self._before_backward(action, step)
                        self._send_upstream(action, batch, module.backward(batch), epoch)
                        self._close(module, action, batch)
                    case Kind.UPDATE:
                        self._update(self._due(actions, step))
                    case Kind.SHARE:
                        self._weights.share(module, epoch, batch[0])
                    case Kind.ADOPT:
                        module.adopt(batch[0])
        self.counters.steps += self._end_step is None

    def begin_epoch(self, first_step: int, began: int) -> None:
        """Start an epoch whose batches are numbered from ``first_step``; its next step is ``began``."""
        self._first_step, self._end_step = first_step, None
        self._gradients.begin_epoch(first_step, began)
        self._weights.begin_epoch(first_step, began)
        self._waited_before_epoch = self._waited_s()

    def end_epoch(self, epoch: int, end_step: int) -> int:
        """Do what is left late, so that the weights hold every batch before ``end_step``. Returns the step before which
        the first stage has ended the epoch."""
        self._end_step = end_step
        self._gradients.end_epoch(end_step)
        for step in range(end_step, end_step + self._longest_lag):
            self.train_step(epoch, step)
        assert not self._inputs and not self._hidden and not self._held and not self._gradients
        update_rest(list(self.modules.values()))
        if self._averaging is not None:
            self._averaging.settle()
        ended_at = self.inlet.end_epoch(epoch, end_step)
        if self._marks_epochs and self.edges.activation_out is not None:
            self.edges.activation_out.send(Header(MessageKind.EPOCH, epoch, ended_at, 0, directive=self.directive))
        return ended_at

    def catch_up(self, epoch: int, step: int) -> None:
        """Take all gradients and weights that the next stage sends up to the end of its ``step``, so that between two
        steps all that is on its way to this stage is in this stage. Only late work leaves any."""
        self._gradients.catch_up(epoch, step)
        self._weights.catch_up(epoch, step)

    def late_since(self, step: int) -> int:
        """The first batch whose late work may be open before ``step``."""
        return max(self._first_step, step - self._longest_lag)

    def restored(self) -> None:
        """The modules hold batches that a checkpoint had in flight: take them on, with no message to give back."""
        for module in self.modules.values():
            for batch, item in module.in_flight.items():
                rows = round(len(item.batch.labels) / item.batch.scale)
                self._inputs.setdefault(batch, Input(item.batch, rows))
                self._unfinished[batch] = self._unfinished.get(batch, 0) + 1
                self._gradients.restored(batch, module)

    def _in(self, step: int) -> Callable[[Action], bool]:
        """Whether an action is to be done in ``step``: its batch is one of this epoch."""
        return lambda action: action.in_step(step, self._first_step if action.lag else step, self._end_step)

    def _due(self, updates: Sequence[Action], step: int) -> Due:
        """The modules that these actions update in ``step``, with the steps of their batches."""
        return [(self.modules[action.module], step - action.lag) for action in filter(self._in(step), updates)]

    @property
    def _longest_lag(self) -> int:
        return max(action.lag for action in self.schedule)

    def _take_input(self, epoch: int, batch: BatchKey) -> None:
        depth = self.inlet.depth()
        if depth is not None:
            self.counters.queue_depth_sum += depth
            self.counters.queue_depth_count += 1
        self._inputs[batch] = self.inlet.next(epoch, *batch)
        self._unfinished[batch] = len(self.modules)
        if batch[1] == 0:  # images of a batch, whoever trains on its rows
            self.counters.images += self._inputs[batch].batch_rows

    def _given(self, module: LocalModule, batch: BatchKey) -> MicroBatch:
        """What a module works on: the input of the stage, or the output of the module before."""
        given = self._inputs[batch].batch
        if module.plan.index == self._first:
            return given
        inputs, local_gradient = self._hidden.pop(batch)
        return replace(given, inputs=inputs, local_gradient=local_gradient)

    def _pass_on_late(self, module: LocalModule, batch: BatchKey, epoch: int) -> None:
        """What waited for the heads of its module."""
        if module.plan.reconciles:
            self._pass_on(module, batch, self._held.pop(batch), epoch)

    def _pass_on(self, module: LocalModule, batch: BatchKey, h: Tensors, epoch: int) -> None:
        """To the next module, here or on the next stage; with SGR once the gradient of the local loss is there."""
        local_gradient = module.in_flight[batch].local_gradient
        if module.plan.reconciles and local_gradient is None and not module.plan.final:
            self._held[batch] = h
        elif module.plan.index != self._last:
            self._hidden[batch] = h, local_gradient
        elif self.edges.activation_out is not None:
            item = self._inputs[batch]
            header = Header(
                MessageKind.TRAIN,
                epoch,
                *batch,
                rows=item.rows,
                batch_rows=item.batch_rows,
                directive=self.directive,
            )
            fields = payload(h, ACTIVATION) | {LABELS: item.batch.labels}
            if self._forward_image:
                assert item.batch.image is not None
                fields[IMAGE] = item.batch.image
            if local_gradient is not None:
                fields[LOCAL_GRADIENT] = local_gradient
            with self.watch.sending(self.wait_s):
                self.edges.activation_out.send(header, **fields)

    def _send_upstream(self, action: Action, batch: BatchKey, gradients: Tensors | None, epoch: int) -> None:
        """To the module before, here or on the previous stage."""
        for module, _, key in messages_sent(action):
            assert gradients is not None
            if module in self.modules:
                self.modules[module].receive(batch, key, gradients)
            else:
                assert self.edges.gradient_out is not None
                item = self._inputs[batch]
                header = Header(MessageKind.GRADIENT, epoch, *batch, key, item.rows, item.batch_rows)
                with self.watch.sending(self.wait_s):
                    self.edges.gradient_out.send(header, **payload(gradients, GRADIENT))

    def _before_backward(self, action: Action, step: int) -> None:
        """All losses of updates that are done together may be there; those of a replica are no news by themselves."""
        if action in self._last_backwards and self._averaging is None:
            losses_together(self._due(self._last_backwards[action], step))

    def _close(self, module: LocalModule, action: Action, batch: BatchKey) -> None:
        """Average what is complete; give buffers back: gradients once their module has used them, the input once every
        module is done."""
        if self._averaging is not None and action.micro_batch == self.micro_batches - 1:
            self._averaging.begin(module, batch[0])
        self._gradients.release(batch, module)
        self._unfinished[batch] -= 1
        if self._unfinished[batch] == 0:
            del self._unfinished[batch]
            self._inputs.pop(batch).release()

    def _update(self, due: Due) -> None:
        if self._averaging is not None:
            for module, step in due:
                self._averaging.finish(module, step)
        try:
            update_together(due)
        except NonFiniteError as error:
            # It may have begun in another module of this stage, whose update comes later.
            steps = {step for _, step in due}
            others = [other.guard.loss_error(step) for other in self.modules.values() for step in steps]
            raise min([error, *filter(None, others)], key=lambda each: each.precedence) from None

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def test(self, epoch: int, step: int, batches: int) -> None:
        """Forward the test set and count the errors of every head on the way, unless told to stop."""
        with closing(self.inlet.tests(epoch, step, batches)) as numbers:
            for number in numbers:
                self.test_step(epoch, number)
                if self.directive is Directive.STOP:
                    return

    def test_averages(self, epoch: int, step: int, batches: int) -> None:
        """:meth:`test` with the averages of all weights in their place, counted apart."""
        of_weights, self.counters = self.counters, Counters()
        with ExitStack() as held:
            for module in self.modules.values():
                assert module.average is not None
                held.enter_context(module.average.in_place())
            self.test(epoch, step, batches)
        of_weights.averaged, self.counters = self.counters, of_weights

    @torch.no_grad()
    def test_step(self, epoch: int, step: int) -> None:
        """Forward one test batch."""
        item = self.inlet.next_test(epoch, step)
        self.watch.testing(epoch, step)
        h, labels = item.batch.inputs, item.batch.labels
        for index, module in self.modules.items():
            h, scores = module.evaluate(h)
            for level, logits in scores.items():
                for metric in module.task.metrics:
                    key, counted = (index, level, metric.name), metric.count(logits, labels)
                    known = self.counters.statistics.get(key)
                    self.counters.statistics[key] = counted if known is None else known + counted
        if self.edges.activation_out is not None:
            header = Header(MessageKind.EVAL, epoch, step, 0, 0, item.rows, item.rows, self.directive)
            self.edges.activation_out.send(header, **payload(h, ACTIVATION), labels=labels)
        else:
            self.counters.test_loss_sum += self.modules[self._last].task.total_loss(h[MAIN], labels)
        self.counters.tested += item.rows
        item.release()

    # --- waiting and counting -----------------------------------------------------------------------------------------

    def wait_s(self) -> float:
        """Seconds spent waiting for neighbours and data so far."""
        edges = self.edges
        ends = (edges.gradient_in, edges.activation_out, edges.gradient_out, edges.weights_in, edges.weights_out)
        averaging = 0.0 if self._averaging is None else self._averaging.wait_s
        return self.inlet.wait_s + averaging + sum(end.wait_s for end in ends if end is not None)

    def bytes_averaged(self) -> int:
        """Bytes sent to the twins in other replicas so far."""
        return 0 if self._averaging is None else self._averaging.bytes_sent

    def wait_since_epoch(self) -> float:
        """Seconds spent waiting since ``begin_epoch``."""
        return self._waited_s() - self._waited_before_epoch

    def _waited_s(self) -> float:
        """Of a GPU the time in which it had nothing to do: it may have worked while the host waited."""
        self.watch.read()
        return self.wait_s() if self.watch.device_time is None else self.watch.idle_s

    def take_counters(self) -> Counters:
        """The counters since the last call."""
        taken, self.counters = self.counters, Counters()
        counts = self.inlet.take_counts()
        taken.busy_s = self.watch.take_busy()
        taken.reused, taken.skipped, taken.held_back = counts.reused, counts.skipped, counts.held_back
        return taken
