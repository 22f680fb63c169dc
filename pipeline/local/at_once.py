"""How many patches a head works on together where ``patches.at_once = "auto"``: as many as memory allows.

    modules   x_m --f_m--> h_m        autograd keeps g_m bytes from forward to backward; G = the largest g_m
    head      forward + backward of n patches together need w(n) bytes, given back before the next ones
    auto      the largest n <= all with w(n) <= G, or 1; w(n) <= G / 2 where both levels work together

While its heads work, a rank so needs at most G more than what is open on it anyway: no rank needs more than the rank of
the largest module does, and that one at most twice its graph. w(n) counts what is alive at a time, the backward pass
included, without what every n needs: the gradients of the feature and of weights.

Not g_m, or what the backward of module m needs on top of it: a late module keeps little, while its decoder gives whole
images, so one patch after another would be left just where calls are dearest; and the device has room for G anyway,
since any rank may own the largest module. Not what is free on a rank: bits of the result depend on n, so n must be
the same in every placement. For the same reason bytes are counted from shapes alone, on tensors without values, in one
dtype and layout, for a fixed number of rows: another batch size or precision changes both sides alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.base.alive import Alive
from pipeline.base.flow import Specs, TensorSpec, bare, passed
from pipeline.local.methods import Level
from pipeline.local.task import Task
from pipeline.models.boundaries import blank
from pipeline.models.heads import FeatureShape, Given
from pipeline.models.patches import PatchedHead
from pipeline.models.unbuilt import no_values, without_weights

CPU = torch.device("cpu")
ROWS = 64  # so many that what does not grow with them, such as the weights' gradients, hardly counts


def largest_graph(modules: Iterable[tuple[Sequence[nn.Module], Specs]]) -> int:
    """Bytes that autograd keeps of ``ROWS`` rows in the local module that needs most; ``modules``: the blocks of each
    and what it is given."""
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
        for head in (head for level in levels for _, head in level.heads()):
            if head.grid > 1 and head.first.takes_patches(len(shape) + 1):
                kind = f"{head} {shape} {available}"
                if kind not in self._known:
                    self._known[kind] = _fitting(head, shape, self._task, available)
                head.at_once = self._known[kind]


def _module_bytes(blocks: Sequence[nn.Module], given: Specs) -> int:
    """Bytes of the distinct storages that autograd keeps of a forward of these blocks, without parameters; 0 where that
    fails."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with _blank_copies(blocks) as blanks:
        flow = bare({name: blank(spec, ROWS, torch.float32, CPU) for name, spec in given.items()})
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                for block in blanks:
                    flow = passed(block(flow))
        except Exception:  # whatever it is: there is no answer without values
            return 0
        own = {tensor.untyped_storage()._cdata for module in blanks for tensor in module.parameters()}
        return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


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
