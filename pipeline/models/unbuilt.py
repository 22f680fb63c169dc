"""A network without weights: planned as shapes, and made real block by block where somebody trains it.

    planned   every block on the meta device: names, shapes, numbers of parameters; no memory, no random numbers
    drawn     the blocks of one rank, or of one module that is measured, with fresh weights

What PyTorch cannot build on the meta device, or would build differently there, is built as it is, from a seed.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from pipeline.base.errors import LocalpipeError
from pipeline.models.backbones import Blocks, Sides, build_blocks, initialise
from pipeline.models.part import Part

T = TypeVar("T")


def without_memory(build: Callable[[], T], seed: int = 0) -> T:
    """What ``build`` makes, its tensors on the meta device, or real ones from ``seed`` where it looks at values. No
    random state changes.

    Raises:
        Whatever ``build`` raises without the meta device as well.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"), _Undrawn():
                return build()
        except LocalpipeError:
            raise
        except (RuntimeError, NotImplementedError):
            torch.manual_seed(seed)
            return build()


class _Undrawn(TorchFunctionMode):
    """Draws no initial weights on the meta device, where PyTorch does so in Python, operation by operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            tensor: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


_DRAWS = {nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, Tensor.uniform_, Tensor.normal_}


def real_blocks(name: str, in_channels: int, classes: int, seed: int, sides: Sides | None = None) -> Blocks:
    """The whole named backbone with weights drawn from ``seed``. Raises ConfigError: unknown name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_blocks(name, in_channels, classes, sides)


def planned_blocks(
    name: str, in_channels: int, classes: int, seed: int = 0, sides: Sides | None = None
) -> Blocks:
    """The named backbone on the meta device; with real weights from ``seed`` where that is not possible: it looks at
    values, or shares weights, which moving from the meta device would separate. Raises ConfigError: unknown name."""
    blocks = without_memory(lambda: build_blocks(name, in_channels, classes, sides), seed)
    uses = Counter(
        id(tensor)
        for block in blocks.values()
        for tensors in (block.named_parameters(remove_duplicate=False), block.named_buffers(remove_duplicate=False))
        for _, tensor in tensors
    )
    shares = any(count > 1 for count in uses.values())
    return real_blocks(name, in_channels, classes, seed, sides) if shares else blocks


def without_weights(
    block: nn.Module, device: torch.device | str = "meta", floating: torch.dtype | None = None
) -> nn.Module:
    """A copy with new parameters and buffers on ``device``; nothing is allocated on the meta device, or within
    :func:`no_values`. ``floating``: dtype of those of floating point; None: as they are."""
    memo: dict[int, Any] = {}
    for tensor in (*block.parameters(), *block.buffers()):
        dtype = floating if tensor.is_floating_point() else None
        made = torch.empty_like(tensor, device=device, dtype=dtype)
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(block, memo)


@contextmanager
def no_values() -> Iterator[None]:
    """All tensors that are made here are blank, within another of these as well; what needs a value raises an
    exception. Unlike those on the meta device they give the device they are for as theirs."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        yield
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def is_planned(block: nn.Module) -> bool:
    """Whether it has tensors on the meta device."""
    return any(tensor.is_meta for tensor in _tensors(block))


def drawn_blocks(
    blocks: Blocks, names: Iterable[str], seed_of: Callable[[str], int], whole: Callable[[], Blocks]
) -> Blocks:
    """The blocks ``names`` with fresh weights, those of each drawn from a seed of its own. Parts of a traced network
    are taken out of a whole one instead, with the weights that its own library draws. No random state changes.

    Args:
        blocks: the network; planned blocks get memory on the CPU, real ones are drawn again where they are.
        names: of the blocks that are wanted.
        seed_of: name of a block -> its seed.
        whole: builds the whole network; called only for parts of a traced one, and for a planned block that holds what
            :func:`initialise` leaves.
    """
    built: Blocks | None = None
    drawn: Blocks = OrderedDict()
    with torch.random.fork_rng(devices=[]):
        for name in names:
            block, planned = blocks[name], is_planned(blocks[name])
            if isinstance(block, Part):
                built = built if built is not None else whole()
                drawn[name] = built[name]
                continue
            if planned:
                _give_memory(block)
            torch.manual_seed(seed_of(name))
            initialise(block)
            if planned and any(map(_is_marked, _tensors(block))):
                built = built if built is not None else whole()
                block = built[name]
                torch.manual_seed(seed_of(name))
                initialise(block)
            drawn[name] = block
    return drawn


def drawn_copy(pattern: nn.Module) -> tuple[nn.Module, list[str]]:
    """A block of the form of ``pattern``, on the default device, with weights that :func:`initialise` draws from the
    default RNG; and the names of what that leaves, which only a constructor fills. Without values where there are
    none: on the meta device, or within :func:`no_values`."""
    device = torch.get_default_device()
    block = without_weights(pattern, device)
    if device.type == "meta" or any(isinstance(tensor, FakeTensor) for tensor in _tensors(block)):
        return block, []
    _fill_with_marks(block)
    for child in block.modules():
        if isinstance(child, nn.MultiheadAttention):  # has no public one
            child._reset_parameters()
    initialise(block)
    named = [*block.named_parameters(), *block.named_buffers()]
    return block, [name for name, tensor in named if _is_marked(tensor)]


def _tensors(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def _give_memory(block: nn.Module) -> None:
    """Memory on the CPU for a planned block, with a mark in every tensor."""
    block.to_empty(device="cpu")
    _fill_with_marks(block)


@torch.no_grad()
def _fill_with_marks(block: nn.Module) -> None:
    for tensor in _tensors(block):
        tensor.fill_(_mark(tensor))


def _mark(tensor: Tensor) -> float | int:
    """A value that no initialisation gives."""
    if tensor.is_floating_point() or tensor.is_complex():
        return float("nan")
    return 1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min


def _is_marked(tensor: Tensor) -> bool:
    """Whether a tensor may still hold a mark: with two values to choose from there is none that stands out."""
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return tensor.dtype == torch.bool or bool((tensor == _mark(tensor)).any())
