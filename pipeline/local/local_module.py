"""One gradient-isolated local module: one forward per step, its heads, and up to three kinds of backward.

    x_m (detached leaf) --f_m--> h_m --+--> cascade level      c_m = w_C dCL_m/dh_m
                                       +--> independent level  a_m = w_I dIL_m/dh_m
    relay(key)    g = (df_m/dx_m)^T (c_m if it is its key + what came from m+1 with this key)     -> module m-1
    backward      grad theta_m = (df_m/dtheta_m)^T (a_m + c_m + everything that came from m+1)
    (update       one optimiser step for theta_m and the heads of m: see local.updates)
    share, adopt  weights upstream: what its first block weighs, for the heads of m-1; what came from m+1, for its own

The independent gradient a_m and messages that end here never go upstream. The order of summation is fixed, so the
result does not depend on timing or placement. x_m and h_m are named sets of tensors (see base.flow); heads stand on
"x", gradients from m+1 come for every tensor of floating point. An action is a method of its name; what it computes,
which may be a CUDA graph (see local.graphs), is the method with an underscore.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.base.config import Config
from pipeline.base.errors import NonFiniteError
from pipeline.base.flow import AUX, MAIN, Flow, Tensors, bare, channels_first, channels_last, named, passed
from pipeline.base.numerics import Numerics, seed_rng, stable_hash
from pipeline.local.accumulation import Accumulation
from pipeline.local.average import WeightAverage
from pipeline.local.both_levels import BothLevels
from pipeline.local.compilation import compile_parts
from pipeline.local.entrance import Maps, embedding
from pipeline.local.graphs import BACKWARD, FORWARD, Capture, Eagerly, Graphs
from pipeline.local.guard import FiniteGuard
from pipeline.local.losses import Losses
from pipeline.local.methods import Level
from pipeline.local.micro_batch import BatchKey, InFlight, MicroBatch
from pipeline.local.muon import hidden_matrices
from pipeline.local.optimiser import Optimiser
from pipeline.local.output_gradients import OutputGradients, summed
from pipeline.local.repeated import count_repeated, imitate_repeated
from pipeline.local.roles import ModulePlan
from pipeline.local.sgr import differentiable_twice, last_loss, reconcile
from pipeline.local.stashes import Stash, Stashes
from pipeline.local.task import Task
from pipeline.local.upstream import FlatWeights, Mailbox, shapes_of
from pipeline.models.heads import EMBEDDING, IMAGE, INPUTS, Given
from pipeline.models.spread import Gradient, whole


class LocalModule:
    """A local module with its auxiliary heads and its optimiser, on one device.

    Args:
        plan: the module's role in the hierarchy.
        blocks: its consecutive blocks, by name.
        levels: its head levels by name, in running order: "cascade" first, others wait for its gradient.
        task: what the network is for.
        config: the run's configuration.
        numerics: dtype, memory layout and device.
        lag: steps between a forward and the backward and update of its batch (schedule `async`).
        mailbox: of the weights of module m+1, where its heads get any.
        maps: those that its heads see as (B, C, H, W) though they are not.
        replica: of several that train on different rows, which draw different random numbers.
        capture: where its actions become CUDA graphs; None: they do not.

    Attributes:
        asks: what its heads ask for, see :class:`pipeline.models.heads.Given`.
        in_flight: micro-batches between their forward and their backward.
        accumulation: of the gradients of several batches, None where every batch has an update.
        average: of its weights, in the order of their state, None where none is asked for.
        losses: of its heads.
        stashes: of a late module, None of others.
        guard: against updates that are not finite.
    """

    def __init__(
        self,
        plan: ModulePlan,
        blocks: OrderedDict[str, nn.Module],
        levels: OrderedDict[str, Level],
        task: Task,
        config: Config,
        numerics: Numerics,
        lag: int = 0,
        mailbox: Mailbox | None = None,
        maps: Maps | None = None,
        replica: int = 0,
        capture: Capture | None = None,
    ) -> None:
        self.plan = plan
        self.blocks = blocks
        self.levels = levels
        self._both = BothLevels(levels) if plan.together else None
        self.task = task
        self.asks = frozenset().union(*(level.asks for level in levels.values()))
        self.numerics = numerics
        self.mailbox = mailbox
        self._maps = maps or Maps()
        self._shared: FlatWeights | None = None
        self._drawn: tuple[object, ...] = (config.train.seed, "step", plan.index)
        if replica:
            self._drawn = (config.train.seed, "replica", replica, plan.index)
        self._reconciliation = config.method.reconciliation
        self._aux_weight = config.model.aux_weight
        parts = (*blocks.values(), *levels.values())
        for part in parts:
            numerics.place(part)
        if config.precision.compile:
            compile_parts(plan, blocks.values(), levels.values(), lag > 0)
        self.parameters = [p for block in blocks.values() for p in block.parameters()]
        head_parameters = [p for level in levels.values() for p in level.parameters()]
        self._trained = self.parameters + head_parameters
        self.optimiser = Optimiser(self._trained, config.optim, self._hidden(), head_parameters, lag)
        several = config.train.accumulate
        self.accumulation = Accumulation(self.optimiser, several, copies=capture is not None) if several > 1 else None
        weights = [weight for part in parts for weight in part.state_dict().values()]
        self.average = WeightAverage(weights, config.train.ema) if config.train.ema else None
        released = config.hierarchy.variant == "released"
        self._repeated = imitate_repeated(blocks, plan.evaluations) if released else []
        self._embeds = INPUTS in self.asks and plan.index == 0 and len(blocks) > 1
        self.stashes = Stashes(blocks, head_parameters) if lag > 0 else None
        self.in_flight: dict[BatchKey, InFlight] = {}
        self.losses = Losses()
        buffers = [b for part in parts for b in part.buffers()]
        skips, on_gpu = config.train.nonfinite == "skip", numerics.device.type == "cuda"
        self._counts_steps_itself = config.schedule.kind == "free"
        self.guard = FiniteGuard(self.losses, buffers, skips, on_gpu, self._not_finite)
        self._buffers = buffers
        self._actions = Eagerly() if capture is None else self._graphs(capture, lag > 0)

    def _graphs(self, capture: Capture, late: bool) -> Graphs:
        name, image = f"local module {self.plan.index} ({self.label})", IMAGE in self.asks
        graphs = Graphs(name, capture, self.in_flight, self._trained, self._forward_again, self._frozen, late, image)
        if self.mailbox is not None and any(level.front is None for level in self.levels.values()):
            graphs.give_up("its heads may keep weights of the next module in other tensors from step to step")
        parts = (*self.blocks.values(), *self.levels.values())
        if any(isinstance(layer, nn.SyncBatchNorm) for part in parts for layer in part.modules()):
            graphs.give_up("its BatchNorm sends messages to other replicas")
        return graphs

    def _frozen(self) -> object:
        """What is no tensor and may change from epoch to epoch."""
        return [list(level.weights.items()) for level in self.levels.values()]

    @property
    def label(self) -> str:
        """Its first and its last block."""
        names = list(self.blocks)
        return names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"

    def _hidden(self) -> list[nn.Parameter]:
        """What the optimiser takes for hidden matrices."""
        heads = [head for level in self.levels.values() for _, patched in level.heads() for head in patched.heads]
        fronts = [level.front for level in self.levels.values() if level.front is not None]
        return hidden_matrices(self.blocks.values(), heads, fronts, self.plan.index == 0, self.plan.final)

    # --- training: called by the stage, in the order of its schedule --------------------------------------------------

    def forward(self, key: BatchKey, batch: MicroBatch) -> Tensors:
        """Run f_m on the detached inputs and return h_m, detached, in the boundary dtype and layout."""
        inputs = {name: x.detach() for name, x in batch.inputs.items()}
        if self.plan.needs_input_gradient:
            for x in inputs.values():
                x.requires_grad_(x.is_floating_point())
        stash: Stash | None = None
        weights: list[Tensor] = list(self.parameters)
        if self.stashes is not None:
            if key[0] not in self.stashes.open:
                self.guard.mend_buffers()  # its first updates are a few forwards away
            stash = self.stashes.take(key[0])
            weights = stash.leaves()
        kept = MicroBatch(inputs, batch.labels, batch.image, batch.scale, batch.local_gradient)
        seed = stable_hash(*self._drawn, *key)
        self.in_flight[key] = InFlight(self._actions.enter(key, kept, stash), {}, weights, seed)
        seed_rng(seed, self.numerics.device)
        self._set_training(True)
        return self._actions.run(key, FORWARD, self._forward)

    def _forward(self, key: BatchKey) -> Tensors:
        item = self.in_flight[key]
        twice = differentiable_twice() if self.plan.reconciles else contextlib.nullcontext()
        flow = bare(item.batch.inputs)
        first = next(iter(self.blocks.values())) if self._embeds else None
        with torch.enable_grad(), self.numerics.autocast(), twice, embedding(first, flow) as found:
            h = self._run_blocks(flow) if self.stashes is None else self.stashes.run(key[0], flow)
        count_repeated(self._repeated, self.plan.evaluations)
        item.outputs, item.embedding = named(h), found.get(MAIN)
        return self._boundary(item.outputs)

    @torch.no_grad()
    def _forward_again(self, key: BatchKey) -> None:
        """The graph of a micro-batch in flight anew; statistics stay as they are."""
        before = [buffer.clone() for buffer in self._buffers]
        seed_rng(self.in_flight[key].rng_seed, self.numerics.device)
        self._forward(key)
        for buffer, value in zip(self._buffers, before, strict=True):
            buffer.data.copy_(value)

    def cascade(self, key: BatchKey) -> None:
        """Run the cascade level: c_m. Where both levels go together, a_m as well."""
        self._add_losses(key, "cascade", self._cascade)

    def _cascade(self, key: BatchKey) -> Tensors:
        item = self.in_flight[key]
        if self._both is None:
            item.own, losses = self._run_level("cascade", item, key[0])
        else:
            found, losses = self._run_heads(item, key[0], self._both.backward)
            item.own, item.independent = found["cascade"], found["independent"]
        return losses

    def independent(self, key: BatchKey) -> None:
        """Run the independent level: a_m."""
        self._add_losses(key, "independent", self._independent)

    def _independent(self, key: BatchKey) -> Tensors:
        item = self.in_flight[key]
        if self.plan.reconciles:
            return self._reconcile("independent", item, key[0])
        item.independent, losses = self._run_level("independent", item, key[0])
        if item.relayed and item.own is not None:  # no message needs it alone any more
            item.independent, item.own = summed([item.independent, item.own], used_up=True), None
        return losses

    def final(self, key: BatchKey) -> None:
        """The last module's loss: that of the task on its output, which is the network's, and on an output "aux"."""
        self._add_losses(key, "final", self._final)

    def _final(self, key: BatchKey) -> Tensors:
        item = self.in_flight[key]
        if self.plan.reconciles:
            return self._reconcile("final", item, key[0])
        total = (self.plan.final_local + self.plan.final_cascade) * item.batch.scale
        item.independent, loss = self._last_loss(item, MAIN, total)
        terms = {"final": loss}
        if AUX in item.outputs and self._aux_weight > 0:
            item.aux, terms["final.aux"] = self._last_loss(item, AUX, total * self._aux_weight)
        return terms

    def _last_loss(self, item: InFlight, name: str, weight: float) -> tuple[Tensor, Tensor]:
        """The weighted gradient of the task's loss on an output, and that loss."""
        leaf = item.outputs[name].detach().requires_grad_()
        with torch.enable_grad():
            loss = self.task.loss(leaf, item.batch.labels)
            loss.backward()
        assert leaf.grad is not None
        return leaf.grad if weight == 1.0 else leaf.grad * weight, loss.detach()

    def _add_losses(self, key: BatchKey, name: str, action: Callable[[BatchKey], Tensors]) -> None:
        """Do an action that gives losses; ``name`` is that of its random numbers too."""
        item, step = self.in_flight[key], key[0]
        seed_rng(stable_hash(item.rng_seed, name), self.numerics.device)
        with self.stashes.heads_of(step) if self.stashes is not None else contextlib.nullcontext():
            losses = self._actions.run(key, name, action)
        self.losses.add(step, self._actions.lasting(losses), item.batch.scale)

    def receive(self, key: BatchKey, message_key: int, gradients: Tensors) -> None:
        """Take gradients of h_m (b, ...) that module m+1 sent under ``message_key``."""
        self.in_flight[key].received[message_key] = self._actions.received(key, message_key, gradients)

    def relay(self, key: BatchKey, message_key: int) -> Tensors:
        """Activation-only backward: the gradients of x_m that travel on under ``message_key``. Keeps the graph."""
        return self._actions.run(key, f"relay of {message_key}", lambda key: self._relay(key, message_key))

    def _relay(self, key: BatchKey, message_key: int) -> Tensors:
        item = self.in_flight[key]
        own = item.own if message_key == self.plan.own_key else None
        start = OutputGradients(item.outputs, [own], [item.received.get(message_key)], keep=True)
        inputs = _differentiable(item.batch.inputs)
        upstream = start.upstream(list(inputs.values()))
        item.relayed = item.relayed or own is not None
        return self._boundary(
            {
                name: torch.zeros_like(x) if gradient is None else gradient
                for (name, x), gradient in zip(inputs.items(), upstream, strict=True)
            }
        )

    def backward(self, key: BatchKey) -> Tensors | None:
        """Full backward into the parameters; frees the graph. Returns the message upstream where it is `merged`."""
        return self._actions.run(key, BACKWARD, self._backward)

    def _backward(self, key: BatchKey) -> Tensors | None:
        item = self.in_flight.pop(key)
        received = [item.received[message_key] for message_key in self.plan.incoming]
        received += [{AUX: item.aux}] if item.aux is not None else []
        keep = self.plan.reconciles  # the next module may have a_m too
        start = OutputGradients(item.outputs, [item.independent, item.own], received, keep)
        merged = self.plan.merged
        inputs = _differentiable(item.batch.inputs) if merged else {}
        leaves = [weight for weight in item.weights if weight.requires_grad] + list(inputs.values())
        del item, received  # so that nobody but the graph holds what is in it
        start.backward(leaves)
        if not merged:
            return None
        upstream = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in inputs.items()}
        if self.plan.final:  # only the cascade share of the last loss leaves the module
            share = self.plan.final_cascade / (self.plan.final_local + self.plan.final_cascade)
            upstream = upstream if share == 1.0 else {name: x * share for name, x in upstream.items()}
        return self._boundary(upstream)

    def gradients(self, step: int) -> list[Tensor]:
        """Those of the batch of ``step``, once its last backward is done: the tensors that its update will use."""
        if self.stashes is None:
            return self.optimiser.gradients()
        return [gradient for gradient in self.stashes.gradients(step) if gradient is not None]

    def take_stashed_gradients(self, step: int) -> None:
        """Where the module is late: put the gradients of the batch of ``step`` where its optimiser looks for them."""
        if self.stashes is not None:
            for parameter, gradient in zip(self._trained, self.stashes.close(step), strict=True):
                parameter.grad = gradient

    def share(self) -> Tensor:
        """A copy of the parameters of its first block, (1, elements); the next call writes it again."""
        first = next(iter(self.blocks.values()))
        if self._shared is None:
            self._shared = FlatWeights(shapes_of(first), self.numerics.weight_dtype, self.numerics.device)
        self._shared.copy(first.parameters())
        return self._shared.flat

    @torch.no_grad()
    def adopt(self, step: int) -> None:
        """Give its heads what module m+1 shared after its update of batch ``step``."""
        assert self.mailbox is not None
        weights = self.mailbox.take(step)
        for level in self.levels.values():
            level.receive_weights(weights, step)

    def kept_tensors(self) -> list[Tensor]:
        """What its updates keep besides the weights: momentum, moments, averages, sums of gradients."""
        kept = [value for _, value in self.optimiser.state()]
        kept += self.average.values if self.average is not None else []
        return kept + (self.accumulation.sums if self.accumulation is not None else [])

    def set_learning_rate(self, lr: float) -> None:
        """Use ``lr`` from the next update on."""
        self.optimiser.lr = lr

    def set_level_weights(self, epoch: int, epochs: int) -> None:
        """Use the levels' weights of ``epoch`` (1-based) of ``epochs`` from the next batch on."""
        for level in self.levels.values():
            level.begin_epoch(epoch, epochs)

    def take_losses(self) -> dict[str, float]:
        """Mean of every loss over the steps that were updated since the last call.

        Raises:
            NonFiniteError: the gradients of the last update were not finite.
        """
        self.guard.confirm()
        return self.losses.take()

    def _run_blocks(self, flow: Flow) -> Flow:
        for block in self.blocks.values():
            flow = passed(block(flow))
        return flow

    def _run_level(self, name: str, item: InFlight, step: int) -> tuple[Gradient, Tensors]:
        heads = self.levels[name]
        found, losses = self._run_heads(item, step, lambda *arguments: {name: heads.backward(*arguments)})
        return found[name], losses

    def _run_heads(
        self, item: InFlight, step: int, run: Callable[..., dict[str, tuple[Gradient, dict[str, Tensor]]]]
    ) -> tuple[dict[str, Gradient], Tensors]:
        """The gradients by level, and the losses."""
        batch, given = item.batch, self._given(item, step)
        found = run(self._feature(item.outputs).detach(), given, batch.scale, self.numerics.autocast)
        losses = {f"{level}.{term}": loss for level, (_, terms) in found.items() for term, loss in terms.items()}
        turned = self._maps.output
        gradients = {n: channels_last(whole(gradient)) if turned else gradient for n, (gradient, _) in found.items()}
        return gradients, losses

    def _reconcile(self, name: str, item: InFlight, step: int) -> Tensors:
        """The loss of the level ``name``, or of the task, with SGR's: a_m, and what the next module is told."""
        aux = name == "final" and AUX in item.outputs and self._aux_weight > 0
        leaves = {n: item.outputs[n].detach().requires_grad_() for n in ((MAIN, AUX) if aux else (MAIN,))}
        with torch.enable_grad(), differentiable_twice():
            if name == "final":
                loss, terms = last_loss(self.task, leaves, item.batch.labels, self._aux_weight)
            else:
                feature, given = self._feature(leaves), self._given(item, step)
                loss, found = self.levels[name].loss(feature, given, self.numerics.autocast)
                terms = {f"{name}.{term}": value for term, value in found.items()}
            asked = item.batch.local_gradient
            entrance = None if asked is None else (item.batch.inputs[MAIN], asked)
            result = reconcile(
                loss, leaves, item.outputs, entrance, self._reconciliation, item.batch.scale, self._trained
            )
        if result.distance is not None:
            terms[f"{name}.reconciliation"] = result.distance
        item.independent, item.aux = result.own[MAIN], result.own.get(AUX)
        item.local_gradient = self.numerics.boundary(result.passed_on)
        return terms

    def _given(self, item: InFlight, step: int) -> Given:
        """What heads see besides the feature."""
        batch, inputs = item.batch, None
        if INPUTS in self.asks:
            maps = self._maps.inputs
            inputs = {n: channels_first(x.detach()) if n in maps else x.detach() for n, x in batch.inputs.items()}
            inputs |= {} if item.embedding is None else {EMBEDDING: item.embedding}
        image = batch.image if IMAGE in self.asks else None
        return Given(batch.labels, image, inputs, self._actions.shown(step))

    def _feature(self, outputs: Tensors) -> Tensor:
        """What heads stand on."""
        return channels_first(outputs[MAIN]) if self._maps.output else outputs[MAIN]

    def _not_finite(self, step: int, what: str, in_losses: bool) -> NonFiniteError:
        if not in_losses:
            sender = f"the gradient that module {self.plan.index + 1} sent or " if self.plan.incoming else ""
            what = f"{what}: {sender}its own backward is not finite"
        return NonFiniteError(
            f"module {self.plan.index} ({self.label}), batch of step {step}: {what}; look at that batch, lower "
            "optim.lr, or leave such updates out with train.nonfinite=skip",
            0 if self._counts_steps_itself else step,
            self.plan.index,
            in_losses,
        )

    # --- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, inputs: Tensors) -> tuple[Tensors, dict[str, Tensor]]:
        """Forward in evaluation mode. Returns h_m (boundary form) and the output of every level that does the
        task, "final" for the network's own."""
        self._set_training(False)
        with self.numerics.autocast():
            h = named(self._run_blocks(bare(inputs)))
            scores = {name: level.logits(self._feature(h)) for name, level in self.levels.items()}
        if self.plan.final:
            scores["final"] = h[MAIN]
        return self._boundary(h), {name: score for name, score in scores.items() if score is not None}

    def _set_training(self, training: bool) -> None:
        for module in (*self.blocks.values(), *self.levels.values()):
            if module.training != training:
                module.train(training)

    def _boundary(self, tensors: Tensors) -> Tensors:
        return {name: self.numerics.boundary(x) for name, x in tensors.items()}


def _differentiable(tensors: Tensors) -> Tensors:
    """Those through which gradients flow."""
    return {name: x for name, x in tensors.items() if x.requires_grad}
