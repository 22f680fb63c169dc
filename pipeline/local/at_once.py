"""How many patches a head works on together where ``patches.at_once = "auto"``: as many as memory allows.

    modules   forward + backward of f_m need b_m bytes; B = the largest b_m, which some rank must have
    heads     forward + backward of n patches together need w(n) bytes, given back before the next ones
    auto      the largest n <= all with w(n) <= B, or 1; w(n) <= B / 2 where both levels work together

So heads at work never need more than the backward of the largest module does. They come on top of what is open on their
rank, its module's own graph: where the largest module has heads, its rank peaks at up to the two together. Both b_m and
w(n) are the most that is alive at a time, without what is there in any form: gradients of outputs and of parameters.

Why not what fits beside the module's graph into what its own backward needs? A late module needs little, while its
decoder gives whole images: patches would come one after another just where calls are dearest. Why not what is free on a
rank? Bits of the result depend on n, so it must be the same in every placement. Therefore bytes are also counted from
shapes alone, on tensors without values, in one dtype and layout, for a fixed number of rows: batch size and precision
change both sides alike, more or less (autocast's copies are not counted).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

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


def largest_backward(modules: Iterable[tuple[Sequence[nn.Module], Specs]]) -> int:
    """Bytes that forward and backward of ``ROWS`` rows need in the local module that needs most; ``modules``: the
    blocks of each and what it is given."""
    different = {f"{blocks} {given}": (blocks, given) for blocks, given in modules}
    return max(_module_bytes(blocks, given) for blocks, given in different.values())


class HeadMemory:
    """Lets heads work on as many patches at once as ``available`` bytes hold of ``ROWS`` rows."""

    def __init__(self, available: int, task: Task) -> None:
        self._available = available
        self._task = task
        self._known: dict[str, int] = {}  # heads of a kind need the same

    def fit(self, levels: Collection[Level], shape: FeatureShape, together: bool = False) -> None:
        """Choose for all patched heads of ``levels``, which may work ``together``, on features of ``shape``; one patch
        where it is not known what they need."""
        available = self._available // (len(levels) if together else 1)
        for level in levels:
            stands_on = shape if level.front is None else level.front.shape
            for _, head in level.heads():
                if head.grid > 1 and head.takes_patches(len(stands_on) + 1):
                    kind = f"{head} {head.reading} {stands_on} {available}"
                    if kind not in self._known:
                        self._known[kind] = _fitting(head, stands_on, self._task, available)
                    head.at_once = self._known[kind]


def _module_bytes(blocks: Sequence[nn.Module], given: Specs) -> int:
    """The most that forward and backward of these blocks have alive, without what stays: the gradients of the outputs
    and of parameters. 0 where that fails."""
    with _blank_copies(blocks) as blanks:
        flow = bare({name: blank(spec, ROWS, torch.float32, CPU) for name, spec in given.items()})
        alive = Alive()
        try:
            with alive:
                for block in blanks:
                    flow = passed(block(flow))
                outputs = [output for output in named(flow).values() if output.requires_grad]
                gradients = [torch.empty_like(output) for output in outputs]
                if outputs:
                    torch.autograd.backward(outputs, gradients)
        except Exception:  # whatever it is: there is no answer without values
            return 0
        stays = gradients + [p.grad for block in blanks for p in block.parameters() if p.grad is not None]
        return alive.most - sum(tensor.nbytes for tensor in stays)


def _fitting(patched: PatchedHead, shape: FeatureShape, task: Task, available: int) -> int:
    """The most patches at once whose work has no more than ``available`` bytes alive; 1 where no number has, or where
    that cannot be counted."""
    fits, least_too_many = 1, patched.grid**2 + 1
    trial = least_too_many - 1
    while fits < trial:
        if 0 < _work_bytes(patched, shape, task, trial) <= available:
            fits = trial
        else:
            least_too_many = trial
        trial = (fits + least_too_many) // 2
    return fits


def _work_bytes(patched: PatchedHead, shape: FeatureShape, task: Task, at_once: int) -> int:
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
