"""A step that is not computed: its tensors have shapes, dtypes, a layout and a device, but no values and no memory.

    planned blocks, or a user's --shapes--> blank blocks and heads --> LocalModule --> Stage: every operation is called

On the meta device alone it would not be the step of the run: layers choose their form by the device, and autocast knows
no device "meta". PyTorch's fake tensors are meta tensors that give the device of the run as theirs. The operations are
the run's but for a few that PyTorch chooses itself by whether a tensor is real.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from pipeline.base.numerics import Numerics
from pipeline.local.local_module import LocalModule
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import is_planned, without_weights
from pipeline.plan.assembly import Plan, build_modules


def blank_modules(plan: Plan, blocks: Blocks, numerics: Numerics) -> list[LocalModule]:
    """All local modules of a plan for one rank, within :func:`pipeline.models.unbuilt.no_values`. ``blocks`` stay as
    they are."""
    shapes = OrderedDict((name, without_weights(block)) for name, block in blocks.items())
    blank = _BlankNumerics(numerics.device, numerics.dtype, numerics.channels_last)
    return build_modules(plan, 0, shapes, blank, fresh=False)


def real_modules(plan: Plan, blocks: Blocks, numerics: Numerics) -> list[LocalModule]:
    """The same with memory and values, for what needs them. ``blocks`` stay as they are."""
    copies = copy.deepcopy(blocks)
    return build_modules(plan, 0, copies, numerics, fresh=any(map(is_planned, copies.values())))


class _BlankNumerics(Numerics):
    """Gives modules blank tensors in the dtype and layout of the run: ``nn.Module.to`` cannot convert fake ones."""

    def place(self, module: nn.Module) -> None:
        blanks: dict[int, Tensor] = {}  # a shared weight stays one
        for child in module.modules():
            for name, weight in child.named_parameters(recurse=False, remove_duplicate=False):
                if id(weight) not in blanks:
                    blanks[id(weight)] = nn.Parameter(self._blank(weight), weight.requires_grad)
                setattr(child, name, blanks[id(weight)])
            for name, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
                setattr(child, name, blanks.setdefault(id(buffer), self._blank(buffer)))

    def _blank(self, tensor: Tensor) -> Tensor:
        dtype = self.weight_dtype if tensor.is_floating_point() else tensor.dtype
        layout = self.layout if tensor.dim() == 4 else torch.contiguous_format
        return torch.empty(tensor.shape, dtype=dtype, device=self.device, memory_format=layout)
