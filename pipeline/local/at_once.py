"""How many patches a head works on together where ``patches.at_once = "auto"``: as many as memory allows.

    modules   f_m keeps g_m bytes from its forward to its backward, and needs b_m >= g_m at most; B = the largest b_m
    heads     forward + backward of n patches together need w(n) bytes, given back before the next ones, beside g_m
    auto      the largest n <= all with g_m + w(n) <= B, or 1; g_m + 2 w(n) <= B where both levels work together

So with a module on each rank no head at work makes the peak larger than what the largest module needs for its own
backward anyway, unless one patch alone does. All of these are the most that is alive at a time, without what is there
in any form: gradients of outputs and of parameters.

Why B, and not b_m of the module itself? A late module needs little, while its decoder gives whole images: patches would
come one after another just where calls are dearest, on ranks that have the memory of the fullest. Why not what is free
on a rank? Bits of the result depend on n, so it must be the same in every placement. Therefore bytes are also counted
from shapes alone, on tensors without values, in one dtype and layout, for a fixed number of rows: batch size and
precision change both sides alike, more or less (autocast's copies are not counted).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.base.alive import Alive
from pipeline.base.flow import Specs, TensorSpec, bare, named, passed
from pipeline.local.methods import Level
from pipeline.local.task import Task
from pipeline.models.boundaries import blank
from pipeline.models.heads import FeatureShape, Given
from pipeline.models.patches import PatchedHead
from pipeline.models.unbuilt import no_values, without_weights

CPU = torch.device("cpu")
ROWS = 64  # so many that what does not grow with them, such as the weights' gradients, hardly counts


@dataclass(frozen=True)
class ModuleBytes:
    """What ``ROWS`` rows need in a local module, heads aside: from its forward to its backward, and at most."""

    graph: int
    backward: int


def bytes_of_modules(modules: Iterable[tuple[Sequence[nn.Module], Specs]]) -> tuple[ModuleBytes, ...]:
    """Of every local module; ``modules``: the blocks of each and what it is given."""
    known: dict[str, ModuleBytes] = {}
    found = []
    for blocks, given in modules:
        kind = f"{blocks} {given}"
        if kind not in known:
            known[kind] = _module_bytes(blocks, given)
        found.append(known[kind])
    return tuple(found)


class HeadMemory:
    """Lets heads work on as many patches at once as there is memory for beside the graph of their module.

    Args:
        modules: what each local module needs.
        task: of the heads.
    """

    def __init__(self, modules: Sequence[ModuleBytes], task: Task) -> None:
        self._modules = modules
        self._task = task
        self._known: dict[str, int] = {}  # heads of a kind need the same

    def fit(self, module: int, levels: Collection[Level], shape: FeatureShape, together: bool = False) -> None:
        """Choose for all patched heads of ``levels``, those of this ``module``, which may work ``together``, on
        features of ``shape``; one patch where it is not known what they need."""
        largest = max(each.backward for each in self._modules)
        available = (largest - self._modules[module].graph) // (len(levels) if together else 1)
        for level in levels:
            stands_on = shape if level.front is None else level.front.shape
            for _, head in level.heads():
                if head.grid > 1 and head.takes_patches(len(stands_on) + 1):
                    kind = f"{head} {head.reading} {stands_on} {available}"
                    if kind not in self._known:
                        self._known[kind] = _fitting(head, stands_on, self._task, available)
                    head.at_once = self._known[kind]


def _module_bytes(blocks: Sequence[nn.Module], given: Specs) -> ModuleBytes:
    """What these blocks have alive, without what stays: the gradients of the outputs and of parameters. 0 where that
    fails."""
    with _blank_copies(blocks) as blanks:
        flow = bare({name: blank(spec, ROWS, torch.float32, CPU) for name, spec in given.items()})
        alive = Alive()
        try:
            with alive:
                for block in blanks:
                    flow = passed(block(flow))
                graph = alive.now
                outputs = [output for output in named(flow).values() if output.requires_grad]
                gradients = [torch.empty_like(output) for output in outputs]
                if outputs:
                    torch.autograd.backward(outputs, gradients)
        except Exception:  # whatever it is: there is no answer without values
            return ModuleBytes(0, 0)
        stays = gradients + [p.grad for block in blanks for p in block.parameters() if p.grad is not None]
        return ModuleBytes(graph, alive.most - sum(tensor.nbytes for tensor in stays))


def _fitting(patched: PatchedHead, shape: FeatureShape, task: Task, available: int) -> int:
    """The most patches at once whose work has no more than ``available`` bytes alive; 1 where no number has, or where
    that cannot be counted."""
    fits, least_too_many = 1, patched.grid**2 + 1
    trial = least_too_many - 1
    while fits < trial:
        if 0 < work_bytes(patched, shape, task, trial) <= available:
            fits = trial
        else:
            least_too_many = trial
        trial = (fits + least_too_many) // 2
    return fits


def work_bytes(patched: PatchedHead, shape: FeatureShape, task: Task, at_once: int) -> int:
    """The most that forward and backward of all patches have alive, ``at_once`` together; without what stays: the
    gradients of the feature and of parameters. 0 where that fails."""
    with _blank_copies([patched]) as (head,):
        feature = blank(TensorSpec(shape), ROWS, torch.float32, CPU)
        target, image = (blank(spec, ROWS, torch.float32, CPU) for spec in (task.target, task.image))
        assert isinstance(head, PatchedHead)
        head.at_once = at_once
        alive = Alive()
        try:
            with alive:
                gradient, _ = head.backward(feature, Given(target, image), 1.0)
        except Exception:  # as above
            return 0
        stays = [gradient, *(p.grad for p in head.parameters() if p.grad is not None)]
        return alive.most - sum(tensor.nbytes for tensor in stays)


@contextmanager
def _blank_copies(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Copies that train on tensors without values, in it."""
    with torch.random.fork_rng(devices=[]), no_values(), torch.enable_grad():
        yield [without_weights(module, CPU, torch.float32).train() for module in modules]
