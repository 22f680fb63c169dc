"""One gradient-isolated local module: one forward per step, its heads, and up to three kinds of backward.

    x_m (detached leaf) --f_m--> h_m --+--> cascade level      c_m = w_C dCL_m/dh_m
                                       +--> independent level  a_m = w_I dIL_m/dh_m
    relay(key)    g = (df_m/dx_m)^T (c_m if it is its key + what came from m+1 with this key)     -> module m-1
    backward      grad theta_m = (df_m/dtheta_m)^T (a_m + c_m + everything that came from m+1)
    update        one optimiser step for theta_m and the heads of m, if its losses and its gradients are finite

(DESIGN 2; ALGORITHMS 3.6.) The independent gradient a_m and messages that end here never go upstream. The order of
summation is fixed, so the result does not depend on timing or placement.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.base.config import Config
from pipeline.base.errors import NonFiniteError
from pipeline.base.numerics import Numerics, seed_rng, stable_hash
from pipeline.local.compilation import compile_parts
from pipeline.local.methods import Level
from pipeline.local.optimiser import build_optimiser, set_learning_rate
from pipeline.local.roles import ModulePlan
from pipeline.models.losses import cross_entropy

BatchKey = tuple[int, int]
"""(step, micro-batch)"""


@dataclass
class InFlight:
    """What a module keeps of one micro-batch between its forward and its backward."""

    x: Tensor  # (b, ...) detached input; a leaf that requires grad when a gradient goes upstream
    h: Tensor  # (b, ...) output, with its graph
    weights: list[Tensor]  # the leaves of the graph that get weight gradients
    labels: Tensor  # int64 (b,)
    image: Tensor | None  # uint8 (b, C, S, S), where a head reconstructs it
    scale: float  # share of this micro-batch in the batch: b / B
    rng_seed: int
    own: Tensor | None = None  # c_m
    independent: Tensor | None = None  # a_m
    received: dict[int, Tensor] = field(default_factory=dict)  # key -> gradient from module m+1


@dataclass
class Stash:
    """What a late module keeps of one step until its update: the weights of its forward, the gradients of its heads."""

    weights: dict[str, dict[str, Tensor]]  # block -> parameter -> copy, a leaf
    head_gradients: list[Tensor | None]

    def leaves(self) -> list[Tensor]:
        """The copies in the order of the module's parameters."""
        return [copy for block in self.weights.values() for copy in block.values()]


class Reading:
    """A number of the device, on its way to the host: reading it waits for it alone, and not for later work."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._arrival: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def finite(self) -> bool:
        """Whether it is neither NaN nor infinite."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return math.isfinite(float(self._value))


class LocalModule:
    """A local module with its auxiliary heads and its optimiser, on one device.

    Args:
        plan: the module's role in the hierarchy.
        blocks: its consecutive blocks, by name.
        levels: its head levels by name, in running order: "cascade" first, others wait for its gradient.
        config: the run's configuration.
        numerics: dtype, memory layout and device.
        lag: steps between a forward and the backward and update of its batch (schedule `async`). A late module keeps
            a copy of its weights per step, on which the backward works, and the gradients of its heads.
    """

    def __init__(
        self,
        plan: ModulePlan,
        blocks: OrderedDict[str, nn.Module],
        levels: OrderedDict[str, Level],
        config: Config,
        numerics: Numerics,
        lag: int = 0,
    ) -> None:
        self.plan = plan
        self.blocks = blocks
        self.levels = levels
        self.numerics = numerics
        self._seed = config.train.seed
        self._clip_norm = config.optim.clip_norm
        for module in (*blocks.values(), *levels.values()):
            numerics.place(module)
        if config.precision.compile:
            compile_parts(plan, blocks.values(), levels.values(), lag > 0)
        self.parameters = [p for block in blocks.values() for p in block.parameters()]
        self._head_parameters = [p for level in levels.values() for p in level.parameters()]
        self._trained = self.parameters + self._head_parameters
        self.optimiser = build_optimiser(self._trained, config.optim)
        self._batchnorms: list[nn.modules.batchnorm._BatchNorm] = []
        if config.hierarchy.variant == "released":
            self._imitate_repeated_evaluations()
        self._late = lag > 0
        self.stashes: dict[int, Stash] = {}
        self._spare: list[Stash] = []  # used up; the next steps write into them
        self.in_flight: dict[BatchKey, InFlight] = {}
        self.open_losses: dict[int, dict[str, Tensor]] = {}  # by step, until its update
        self.loss_sums: dict[str, Tensor] = {}
        self.loss_steps = 0
        self.skipped_steps = 0
        self._skips = config.train.nonfinite == "skip"
        self._counts_steps_itself = config.schedule.kind == "free"
        self._readings: dict[int, Reading] = {}  # by step: its losses, until its update
        self._unconfirmed: tuple[int, Reading] | None = None  # step and gradients of the last update
        buffers = [b for part in (*blocks.values(), *levels.values()) for b in part.buffers() if b.is_floating_point()]
        self._good_buffers = [(buffer, buffer.detach().clone()) for buffer in buffers] if self._skips else []

    @property
    def needs_image(self) -> bool:
        """Whether one of its heads reconstructs the image."""
        return any(level.needs_image for level in self.levels.values())

    def _imitate_repeated_evaluations(self) -> None:
        """The released code evaluates a module n times a step, which moves BatchNorm statistics n times: momentum
        1 - 0.9^n gives the same statistics in one evaluation. The stem of module 0 is evaluated once there."""
        repeated = [block for name, block in self.blocks.items() if name != "stem"]
        for block in repeated:
            for child in block.modules():
                if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.momentum is not None:
                    child.momentum = 1.0 - (1.0 - child.momentum) ** self.plan.evaluations
                    self._batchnorms.append(child)

    # --- training: called by the schedule, in its order -------------------------------------------------------------

    def forward(
        self, key: BatchKey, x: Tensor, labels: Tensor, image: Tensor | None, scale: float
    ) -> Tensor:
        """Run f_m on a detached input (b, ...) and return h_m, detached, in the boundary dtype and layout."""
        x = x.detach()
        if self.plan.needs_input_gradient:
            x.requires_grad_()
        seed = stable_hash(self._seed, "step", self.plan.index, *key)
        seed_rng(seed, self.numerics.device)
        self._set_training(True)
        with torch.enable_grad(), self.numerics.autocast():
            if self._late:
                h, weights = self._forward_on_a_copy(key[0], x)
            else:
                h, weights = self._run_blocks(x), list(self.parameters)
        for batchnorm in self._batchnorms:
            if batchnorm.num_batches_tracked is not None:
                batchnorm.num_batches_tracked += self.plan.evaluations - 1
        self.in_flight[key] = InFlight(x, h, weights, labels, image, scale, seed)
        return self.numerics.boundary(h)

    def _run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x

    def _forward_on_a_copy(self, step: int, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Forward with copies of the weights: updates come before this graph's backward and must not reach it. The
        micro-batches of a step share the copies. BatchNorm's running statistics are not copied: they are no weights."""
        if step not in self.stashes:
            self.mend_buffers()  # its first updates are a few forwards away
            self.stashes[step] = self._spare.pop() if self._spare else self.new_stash()
            with torch.no_grad():
                for copy, parameter in zip(self.stashes[step].leaves(), self.parameters, strict=True):
                    copy.copy_(parameter)
        stash = self.stashes[step]
        for name, block in self.blocks.items():
            x = torch.func.functional_call(block, stash.weights[name], (x,))
        return x, stash.leaves()

    def new_stash(self) -> Stash:
        copies = {
            name: {key: torch.empty_like(p).requires_grad_(p.requires_grad) for key, p in block.named_parameters()}
            for name, block in self.blocks.items()
        }
        return Stash(copies, [None] * len(self._head_parameters))

    def cascade(self, key: BatchKey) -> None:
        """Run the cascade level: c_m."""
        item = self.in_flight[key]
        item.own = self._run_level("cascade", item, key[0])

    def independent(self, key: BatchKey) -> None:
        """Run the independent level: a_m."""
        item = self.in_flight[key]
        item.independent = self._run_level("independent", item, key[0])

    def final(self, key: BatchKey) -> None:
        """The last module's loss: cross-entropy of its output, which is the network's logits."""
        item = self.in_flight[key]
        leaf = item.h.detach().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(leaf, item.labels)
            loss.backward()
        self._record(key[0], "final", loss.detach(), item.scale)
        total = (self.plan.final_local + self.plan.final_cascade) * item.scale
        assert leaf.grad is not None
        item.independent = leaf.grad if total == 1.0 else leaf.grad * total

    def receive(self, key: BatchKey, message_key: int, gradient: Tensor) -> None:
        """Take a gradient of h_m (b, ...) that module m+1 sent under ``message_key``."""
        self.in_flight[key].received[message_key] = gradient

    def relay(self, key: BatchKey, message_key: int) -> Tensor:
        """Activation-only backward: the gradient of x_m that travels on under ``message_key``. Keeps the graph."""
        item = self.in_flight[key]
        gradient = _sum(
            [item.own if message_key == self.plan.own_key else None, item.received.get(message_key)], like=item.h
        )
        (upstream,) = torch.autograd.grad(item.h, item.x, gradient, retain_graph=True)
        return self.numerics.boundary(upstream)

    def backward(self, key: BatchKey) -> Tensor | None:
        """Full backward into the parameters; frees the graph. Returns the message upstream where it is `merged`."""
        losses = self.open_losses.get(key[0])
        if losses:  # the heads are done: the device sends their losses before it begins the backward
            self._readings[key[0]] = Reading(torch.stack(tuple(losses.values())).sum())
        item = self.in_flight.pop(key)
        received = [item.received[message_key] for message_key in self.plan.incoming]
        total = _sum([item.independent, item.own, *received], like=item.h)
        merged = self.plan.merged
        inputs = [weight for weight in item.weights if weight.requires_grad] + ([item.x] if merged else [])
        if inputs:
            torch.autograd.backward(item.h, total, inputs=inputs)
        if not merged:
            return None
        upstream = item.x.grad
        assert upstream is not None
        if self.plan.final:  # only the cascade share of the last loss leaves the module
            share = self.plan.final_cascade / (self.plan.final_local + self.plan.final_cascade)
            upstream = upstream if share == 1.0 else upstream * share
        return self.numerics.boundary(upstream)

    def update(self, step: int) -> None:
        """Clip, step with the gradients of the batch of ``step``, clear the gradients.

        Without the step where a loss of that batch or a gradient is not finite and ``train.nonfinite`` is "skip".

        Raises:
            NonFiniteError: one of them is not finite and it is "stop".
        """
        if self._late:
            stash = self.stashes.pop(step)
            gradients = [leaf.grad for leaf in stash.leaves()] + stash.head_gradients
            for parameter, gradient in zip(self._trained, gradients, strict=True):
                parameter.grad = gradient
            for leaf in stash.leaves():
                leaf.grad = None
            stash.head_gradients = [None] * len(self._head_parameters)
            self._spare.append(stash)
        if self._is_finite(step):
            if self._clip_norm:
                torch.nn.utils.clip_grad_norm_(self._trained, self._clip_norm)
            self.optimiser.step()
            for name, total in self.open_losses.pop(step, {}).items():
                self.loss_sums[name] = self.loss_sums.get(name, 0.0) + total
            self.loss_steps += 1
        else:
            self.open_losses.pop(step, None)
            self.skipped_steps += 1
        self.optimiser.zero_grad(set_to_none=True)
        self.mend_buffers()

    def _is_finite(self, step: int) -> bool:
        """Whether the update of ``step`` may be done; False only where it is to be skipped.

        The losses were read off before the backward, so to wait for them leaves the device its work. To wait for the
        gradients does not: on a GPU a run that stops on them looks one update later (see ``confirm``).
        """
        losses = self._readings.pop(step, None)
        present = [p.grad for p in self._trained if p.grad is not None]
        gradients = Reading(torch.nn.utils.get_total_norm(present, math.inf))
        losses_finite = losses is None or losses.finite()
        if self._skips:
            return losses_finite and gradients.finite()
        self.confirm()
        error = None if losses_finite else self.loss_error(step)
        if error is not None:
            raise error
        self._unconfirmed = step, gradients
        if self.numerics.device.type != "cuda":
            self.confirm()
        return True

    def confirm(self) -> None:
        """Look at the gradients of the last update; do it before its weights are saved.

        Raises:
            NonFiniteError: they were not finite.
        """
        if self._unconfirmed is None:
            return
        (step, gradients), self._unconfirmed = self._unconfirmed, None
        if not gradients.finite():
            sender = f"the gradient that module {self.plan.index + 1} sent or " if self.plan.incoming else ""
            raise self._not_finite(
                step, f"losses are finite, gradients of weights are not: {sender}its own backward is not finite", False
            )

    def loss_error(self, step: int) -> NonFiniteError | None:
        """What is wrong with the losses of ``step``, whose update is still to come. It waits for the device."""
        values = {name: float(total) for name, total in self.open_losses.get(step, {}).items()}
        bad = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
        return self._not_finite(step, f"loss not finite: {bad}", True) if bad else None

    def _not_finite(self, step: int, what: str, in_losses: bool) -> NonFiniteError:
        names = list(self.blocks)
        label = names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"
        return NonFiniteError(
            f"module {self.plan.index} ({label}), batch of step {step}: {what}; look at that batch, lower optim.lr, or "
            "leave such updates out with train.nonfinite=skip",
            0 if self._counts_steps_itself else step,
            self.plan.index,
            in_losses,
        )

    def mend_buffers(self) -> None:
        """Where updates are skipped: undo what a bad batch did to running statistics, and keep the good ones.

        Also called once the buffers have been set from outside.
        """
        for buffer, good in self._good_buffers:
            torch.where(buffer.isfinite(), buffer, good, out=good)
            buffer.data.copy_(good)  # .data: open graphs hold BatchNorm's statistics, and their backward reads none

    def set_learning_rate(self, lr: float) -> None:
        """Use ``lr`` from the next update on."""
        set_learning_rate(self.optimiser, lr)

    def _run_level(self, name: str, item: InFlight, step: int) -> Tensor:
        seed_rng(stable_hash(item.rng_seed, name), self.numerics.device)
        stash = self.stashes.get(step)
        if stash is not None:
            self._swap_head_gradients(stash)
        gradient, losses = self.levels[name].backward(
            item.h.detach(), item.labels, item.image, item.scale, self.numerics.autocast
        )
        if stash is not None:
            self._swap_head_gradients(stash)
        for term, loss in losses.items():
            self._record(step, f"{name}.{term}", loss, item.scale)
        return gradient

    def _swap_head_gradients(self, stash: Stash) -> None:
        """Exchange the heads' gradients with those of one step, so that micro-batches of a step add up."""
        for index, parameter in enumerate(self._head_parameters):
            parameter.grad, stash.head_gradients[index] = stash.head_gradients[index], parameter.grad

    def _record(self, step: int, name: str, loss: Tensor, scale: float) -> None:
        """Sum losses on the device; reading them is left to the end of the epoch, so nothing waits for them here."""
        losses = self.open_losses.setdefault(step, {})
        losses[name] = losses.get(name, 0.0) + loss * scale

    def take_losses(self) -> dict[str, float]:
        """Mean of every loss over the steps that were updated since the last call.

        Raises:
            NonFiniteError: see ``confirm``.
        """
        self.confirm()
        means = {name: float(total) / self.loss_steps for name, total in self.loss_sums.items()}
        self.loss_sums.clear()
        self.loss_steps = 0
        return means

    def take_skipped(self) -> int:
        """Number of updates left out since the last call."""
        taken, self.skipped_steps = self.skipped_steps, 0
        return taken

    # --- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward in evaluation mode. Returns h_m (boundary form) and the logits of every level that classifies."""
        self._set_training(False)
        with self.numerics.autocast():
            h = self._run_blocks(x)
            scores = {name: level.logits(h) for name, level in self.levels.items()}
        if self.plan.final:
            scores["final"] = h
        return self.numerics.boundary(h), {name: score for name, score in scores.items() if score is not None}

    def _set_training(self, training: bool) -> None:
        for module in (*self.blocks.values(), *self.levels.values()):
            if module.training != training:
                module.train(training)


def _sum(terms: list[Tensor | None], like: Tensor) -> Tensor:
    """Sum in the given order, in the dtype of ``like``; zeros where there is nothing."""
    total: Tensor | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return torch.zeros_like(like) if total is None else total.to(like.dtype)
