"""The state of one local module as a flat dict of tensors on the CPU, and back. It does not depend on the placement.

    blocks...., heads....           parameters and buffers, see weights
    optimiser.<parameter>.<name>    momentum, moments, step counts
    accumulated.<weight>, .seen, .good      sums of the gradients of batches whose common update is still to come
    average.<name of a weight>      its moving average, once there is one
    losses.<term>, losses.steps     sums of the epoch so far            losses.skipped    updates left out
    open.<step>.<term>              losses of a step whose update is still to come
    late.<step>...                  schedule `async`: what is in flight between a forward and its late update
    upstream.<step>                 weights of the next module that are shared and not yet adopted; upstream.declared
    busy_s                          seconds that the module has been busy in the epoch so far; from the loop

A batch in flight is its input, what its heads said and what has arrived from the next module; its graph is made anew by
the same forward on the same stashed weights, with the same random numbers. That forward also moves BatchNorm's running
statistics, so the saved buffers are put in last. All else that is random is seeded by (seed, epoch, step, module), so
the position of a run is the state of its random numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN, Tensors
from pipeline.local.late_parts import STRIDES
from pipeline.local.local_module import LocalModule
from pipeline.local.micro_batch import BatchKey, InFlight, MicroBatch
from pipeline.local.to_host import to_host
from pipeline.local.weights import AVERAGE, State, below, live_weights, weights_of
from pipeline.models.spread import whole

BUSY = "busy_s"
OPTIMISER, ACCUMULATED = "optimiser.", "accumulated."


def module_state(module: LocalModule) -> State:
    """Copies of all state of ``module`` between two steps, on the CPU; from a GPU they are on their way, see
    :func:`pipeline.local.to_host.to_host`.

    Raises:
        NonFiniteError: the last update was done with gradients that were not finite.
    """
    module.guard.confirm()
    module.guard.mend_buffers()
    state: State = {}
    for name, value in live_weights(module).items():
        state[name] = to_host(value)
    state |= {OPTIMISER + name: to_host(value) for name, value in module.optimiser.state()}
    if module.accumulation is not None:
        state |= {ACCUMULATED + name: to_host(value) for name, value in module.accumulation.state()}
    if module.average is not None and module.average.values:
        named = zip(live_weights(module), module.average.values, strict=True)
        state |= {AVERAGE + name: to_host(value) for name, value in named}
    losses = module.losses
    for name, total in losses.sums.items():
        state[f"losses.{name}"] = to_host(total)
    state["losses.steps"] = torch.tensor(losses.steps)
    state["losses.skipped"] = torch.tensor(losses.skipped)
    for step, terms in losses.open.items():
        state.update({f"open.{step}.{name}": to_host(total) for name, total in terms.items()})
    for step, stash in module.stashes.open.items() if module.stashes is not None else ():
        for index, weight in enumerate(stash.leaves()):
            state[f"late.{step}.weight.{index}"] = to_host(weight)
        for index, gradient in enumerate(stash.head_gradients):
            if gradient is not None:
                _put(state, f"late.{step}.head_gradient.{index}", gradient)
    for (step, micro_batch), item in module.in_flight.items():
        prefix = f"late.{step}.batch.{micro_batch}"
        batch = item.batch
        kept: dict[str, Tensor | None] = {"labels": batch.labels, "image": batch.image}
        for what, said in (("own", item.own), ("independent", item.independent)):
            kept[what] = None if said is None else whole(said)
        kept |= _flat("x", batch.inputs)
        for key, gradients in item.received.items():
            kept |= _flat(f"received.{key}", gradients)
        for field, tensor in kept.items():
            if tensor is not None:
                _put(state, f"{prefix}.{field}", tensor)
        state[f"{prefix}.scale"] = torch.tensor(batch.scale, dtype=torch.float64)
    if module.mailbox is not None:
        state |= module.mailbox.state()
    return state


def restore_module(module: LocalModule, state: State) -> None:
    """Put a state of :func:`module_state` into a module that was built alike.

    Raises:
        ConfigError: a tensor is missing, left over, or of another shape or dtype; weights upstream come at other steps.
    """
    if module.mailbox is not None:
        module.mailbox.restore(state)
    _restore_late(module, state)
    expected = live_weights(module)
    found = weights_of(state).keys()
    if expected.keys() != found:
        odd = sorted(expected.keys() ^ found)
        raise ConfigError(
            f"the checkpoint does not fit local module {module.plan.index}: "
            f"{'only there' if odd[0] in found else 'missing there'}: {', '.join(odd[:3])}"
        )
    with torch.no_grad():
        for name, value in expected.items():
            if value.shape != state[name].shape:
                raise ConfigError(
                    f"the checkpoint does not fit local module {module.plan.index}: {name} has the shape "
                    f"{tuple(state[name].shape)} there and {tuple(value.shape)} here"
                )
            if value.dtype != state[name].dtype:
                raise ConfigError(
                    f"the checkpoint does not fit local module {module.plan.index}: {name} is of {state[name].dtype} "
                    f"there and of {value.dtype} here"
                )
            # Not in the eyes of autograd: the graphs made above hold BatchNorm's running statistics, which a backward
            # in training mode does not read.
            value.data.copy_(state[name])
    module.guard.mend_buffers()
    module.optimiser.restore(below(state, OPTIMISER))
    if module.accumulation is not None:
        module.accumulation.restore(below(state, ACCUMULATED))
    averages = below(state, AVERAGE)
    if module.average is not None and averages:
        module.average.restore([averages[name] for name in expected])
    device = module.numerics.device
    for name, total in state.items():
        if name.startswith("open."):
            _, step, term = name.split(".", 2)
            module.losses.open.setdefault(int(step), {})[term] = total.to(device)
    losses = {name.removeprefix("losses."): value for name, value in state.items() if name.startswith("losses.")}
    module.losses.steps, module.losses.skipped = int(losses.pop("steps")), int(losses.pop("skipped"))
    module.losses.sums = {name: value.to(device) for name, value in losses.items()}


def _restore_late(module: LocalModule, state: State) -> None:
    """Batches in flight: forward again, then put the gradients where they were."""
    device = module.numerics.device
    batches: dict[BatchKey, State] = {}
    for name in state:
        if not name.startswith("late.") or name.endswith(STRIDES):
            continue
        assert module.stashes is not None
        _, step, kind, rest = name.split(".", 3)
        if int(step) not in module.stashes.open:
            module.stashes.open[int(step)] = module.stashes.empty()
        stash = module.stashes.open[int(step)]
        if kind == "weight":
            with torch.no_grad():
                stash.leaves()[int(rest)].copy_(state[name])
        elif kind == "head_gradient":
            stash.head_gradients[int(rest)] = _get(state, name, device)
        else:
            micro_batch, field = rest.split(".", 1)
            batches.setdefault((int(step), int(micro_batch)), {})[field] = _get(state, name, device)
    for key in sorted(batches):
        item = batches[key]
        inputs = _named("x", item)
        module.forward(key, MicroBatch(inputs, item["labels"], item.get("image"), float(item["scale"])))
        flying: InFlight = module.in_flight[key]
        flying.own, flying.independent = item.get("own"), item.get("independent")
        keys = {int(field.split(".")[1]) for field in item if field.startswith("received.")}
        flying.received = {message_key: _named(f"received.{message_key}", item) for message_key in keys}


def _flat(prefix: str, tensors: Tensors) -> State:
    """``x`` is called by the prefix alone, others ``prefix.name``."""
    return {prefix if name == MAIN else f"{prefix}.{name}": value for name, value in tensors.items()}


def _named(prefix: str, item: State) -> Tensors:
    """The inverse of :func:`_flat`."""
    found = {MAIN: item[prefix]} if prefix in item else {}
    return found | {
        field.removeprefix(f"{prefix}."): value for field, value in item.items() if field.startswith(f"{prefix}.")
    }


def _put(state: State, name: str, value: Tensor) -> None:
    if value.dim() == 4:
        state[name + STRIDES] = torch.tensor(torch.empty_like(value, device="meta").stride())
    state[name] = to_host(value.detach().contiguous())


def _get(state: State, name: str, device: torch.device) -> Tensor:
    value = state[name]
    strides = state.get(name + STRIDES)
    if strides is None:
        return value.to(device)
    laid_out = torch.empty_strided(value.shape, strides.tolist(), dtype=value.dtype, device=device)
    return laid_out.copy_(value)
