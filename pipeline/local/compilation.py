"""torch.compile where it pays: auxiliary heads, and modules whose graph is walked once.

A module that relays a cascade gradient walks its graph twice, the first time for the activations only. A compiled graph
has one backward, so it would compute the weight gradients both times: such a module stays as it is. So does a late
module (schedule `async`), whose weights are another copy in every step. The compiler chooses the memory layout itself,
so a block for which NHWC would corrupt memory on a CPU (see numerics) stays as it is as well.

Heads of several modules are compiled for each of their shapes: what the compiler would make for all shapes at once
fails on a decoder of many patches, and shapes of a run hardly change (a short last batch is compiled anew).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

import torch
from torch import nn

from pipeline.base.errors import ConfigError
from pipeline.base.numerics import narrow_strided_convolution
from pipeline.local.methods import Level
from pipeline.local.roles import ModulePlan


def compile_parts(plan: ModulePlan, blocks: Iterable[nn.Module], levels: Iterable[Level], late: bool) -> None:
    """Compile heads and, where it pays, blocks, in place: names of parameters stay as they are."""
    for level in levels:
        for _, patched in level.heads():
            for head in patched.heads:
                for name in ("loss", "loss_of_means", "losses_of_patches"):
                    setattr(head, name, torch.compile(getattr(head, name), dynamic=False))
    if not late and (plan.merged or not plan.outgoing):
        for block in blocks:
            if narrow_strided_convolution([block]) is None:
                block.compile()


def refuse_without_compiler(device: torch.device) -> None:
    """On a CPU the generated code needs a C++ compiler.

    Raises:
        ConfigError: there is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"precision.compile = true needs a C++ compiler, and '{compiler}' is not found; install g++, set CXX or "
            "use precision.compile=false"
        )
