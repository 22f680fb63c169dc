"""How many patches a head works on together where ``patches.at_once = "auto"``: as many as memory allows.

    modules   x_m --f_m--> h_m     each keeps bytes for its own backward; the largest one G
    head      a patch              keeps p bytes: G / p patches at once, one at least, all at most

So the graphs of a head at work never need more than the largest module's own, which some rank must hold anyway. Bytes
are counted from shapes alone, on blank tensors without memory, in one dtype: the bits of the result depend on the
answer, so it must be the same on every rank and in every placement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from pipeline.base.flow import Specs, TensorSpec, bare, passed
from pipeline.local.methods import Level
from pipeline.local.task import Task
from pipeline.models.boundaries import ROWS, blank
from pipeline.models.heads import AuxiliaryHead, FeatureShape, Given
from pipeline.models.patches import PatchedHead
from pipeline.models.unbuilt import no_values, without_weights

CPU = torch.device("cpu")


def largest_graph(modules: Iterable[tuple[Sequence[nn.Module], Specs]]) -> int:
    """Bytes that autograd keeps of two rows in the local module that needs most; ``modules`` are the blocks of each and
    what it is given."""
    different = {f"{blocks} {given}": (blocks, given) for blocks, given in modules}
    return max(_module_bytes(blocks, given) for blocks, given in different.values())


class HeadMemory:
    """Lets heads work on as many patches at once as ``available`` bytes hold of two rows."""

    def __init__(self, available: int, task: Task) -> None:
        self._available = available
        self._task = task
        self._known: dict[str, int] = {}  # heads of a kind keep the same

    def fit(self, levels: Collection[Level], shape: FeatureShape, together: bool = False) -> None:
        """Choose for all patched heads of ``levels``, which may work ``together``, on features of ``shape``; one patch
        where it is not known what they keep."""
        available = self._available // (len(levels) if together else 1)
        for head in (head for level in levels for _, head in level.heads()):
            if head.grid > 1 and head.first.takes_patches(len(shape) + 1):
                kind = f"{head} {shape}"
                if kind not in self._known:
                    self._known[kind] = _patch_bytes(head, shape, self._task)
                one = self._known[kind]
                head.at_once = max(1, min(available // one, head.grid**2)) if one else 1


def _module_bytes(blocks: Sequence[nn.Module], given: Specs) -> int:
    """What autograd keeps of a forward of these blocks on two rows."""

    def run(blanks: list[nn.Module]) -> None:
        flow = bare({name: blank(spec, ROWS, torch.float32, CPU) for name, spec in given.items()})
        for block in blanks:
            flow = passed(block(flow))

    return _kept_bytes(blocks, run)


def _patch_bytes(patched: PatchedHead, shape: FeatureShape, task: Task) -> int:
    """What autograd keeps of one patch on two rows."""

    def run(heads: list[nn.Module]) -> object:
        feature = blank(TensorSpec(shape), ROWS, torch.float32, CPU)
        target, image = (blank(spec, ROWS, torch.float32, CPU) for spec in (task.target, task.image))
        patch, given = patched.first_patch(feature, Given(target, image))
        (head,) = heads
        assert isinstance(head, AuxiliaryHead)
        return head.loss(patch.requires_grad_(), given)

    return _kept_bytes([patched.first], run)


def _kept_bytes(modules: Iterable[nn.Module], run: Callable[[list[nn.Module]], object]) -> int:
    """Bytes of the distinct storages that autograd keeps of ``run(blank copies of modules)``, without parameters; 0
    where it fails."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.random.fork_rng(devices=[]), no_values():
        blanks = [without_weights(module, CPU, torch.float32).train() for module in modules]
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = run(blanks)
        except Exception:  # whatever it is: there is no answer without values
            return 0
        own = {tensor.untyped_storage()._cdata for module in blanks for tensor in module.parameters()}
        del result
        return sum(storage.nbytes() for key, storage in kept.items() if key not in own)
