"""The weights of local modules (parameters and buffers): what they are called, here and in files, and their digest.

    state of a local module, checkpoints    blocks.<block>.<name>               heads.<level>.<name>
    model.pt, an export                     <block>.<name> (the un-cut network's)
    heads.pt                                                                    module<m>.<level>.<name>
    an export with heads                    <block>.<name>                      heads.module<m>.<level>.<name>

    blocks.layer1.0.conv1.weight --> layer1.0.conv1.weight        heads.cascade.terms.0.weight, of local module 3
                                                                  --> module3.cascade.terms.0.weight

Blocks of a traced network (:class:`pipeline.models.part.Part`) have its own names behind a "/":

    blocks.conv1./.bn1.weight    --> bn1.weight

No other file puts such names together or takes them apart. What else the state of a module holds while it trains is
called after its prefixes in module_state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline.base.config import Config
from pipeline.local.local_module import LocalModule
from pipeline.models.backbones import Sides, UncutModel, build_blocks
from pipeline.models.part import uncut_name

BLOCKS, HEADS = "blocks.", "heads."
AVERAGE = "average."
"""Before the name of a weight in the state of a local module: its moving average."""
State = dict[str, Tensor]


def networks(module: LocalModule) -> Iterator[tuple[str, nn.Module]]:
    """``blocks.<block>.`` with each block, then ``heads.<level>.`` with each head level, in their order."""
    for prefix, parts in ((BLOCKS, module.blocks), (HEADS, module.levels)):
        for name, network in parts.items():
            yield f"{prefix}{name}.", network


def live_weights(module: LocalModule) -> State:
    """The weights of ``module`` themselves, which training changes, by their names in its state."""
    return {
        prefix + name: value for prefix, network in networks(module) for name, value in network.state_dict().items()
    }


def module_weights(module: LocalModule) -> State:
    """The weights of ``module`` on the CPU, where no copy is made of what is there already."""
    return {name: value.detach().cpu() for name, value in live_weights(module).items()}


def weights_of(state: State) -> State:
    """The weights in the state of a local module, which may hold more."""
    return {name: value for name, value in state.items() if name.startswith((BLOCKS, HEADS))}


def averages_of(state: State) -> State:
    """The moving averages in the state of a local module, called as the weights; none without ``train.ema``."""
    return weights_of(below(state, AVERAGE))


def below(state: State, prefix: str) -> State:
    """The entries of ``state`` under ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def model_state(states: Sequence[State]) -> State:
    """The state dict of the un-cut network (model.pt) from the states of all local modules in order."""
    return {
        uncut_name(name): value.contiguous() for state in states for name, value in below(state, BLOCKS).items()
    }


def heads_state(states: Sequence[State], prefix: str = "") -> State:
    """All auxiliary heads (heads.pt) from the states of all local modules in order; ``prefix``: before every name."""
    named = [_heads(index, state) for index, state in enumerate(states)]
    return {prefix + name: value.contiguous() for heads in named for name, value in heads.items()}


def weights_sha256(states: Sequence[State]) -> str:
    """SHA-256 over names (as in model.pt and heads.pt), dtypes, shapes and bytes of all weights.

    Args:
        states: of all local modules in order, on the CPU; what are no weights does not count.
    """
    digest = hashlib.sha256()
    for index, state in enumerate(states):
        for name, value in [*model_state([state]).items(), *_heads(index, state).items()]:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _heads(index: int, state: State) -> State:
    return {f"module{index}.{name}": value for name, value in below(state, HEADS).items()}


def load_model(config: Config, classes: int, in_channels: int = 3, sides: Sides | None = None) -> nn.Module:
    """The un-cut network of ``config.model.name``, into which a run's ``model.pt`` loads.

    Args:
        sides: (H, W) of the images; matters to a vision transformer.
    """
    return UncutModel(build_blocks(config.model.name, in_channels, classes, sides))
