"""What every block of a network gives, found by a dry run: names, shapes, dtypes, and which axes vary with the length.

    blank batch on the meta device --> block --> block --> ...     shapes and dtypes only: no arithmetic, no memory
    the same, shorter              --> block --> block --> ...     where a shape differs, that axis varies
    images of twice the sides      --> block --> block --> ...     the axis of a map that stays is its channels

The blocks of a user's own network are copied without their weights. What cannot run on the meta device, because it
looks at values, runs for real, on two rows.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN, Flow, Specs, Tensors, TensorSpec, bare, named
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import without_weights

ROWS = 2
META = torch.device("meta")


def boundary_specs(blocks: Blocks, inputs: Specs, entrances: Collection[str] = ()) -> dict[str, Specs]:
    """What every block gives, from evaluation passes over blank batches.

    Args:
        blocks: the network; neither its weights nor its mode change.
        inputs: of the first block; where an axis varies, the network is run on a shorter batch as well.
        entrances: first blocks of local modules.

    Raises:
        ConfigError: a block fails on what it would receive, or gives something else than a tensor or a dict of named
            tensors, each with a row per sample; one of ``entrances`` changes its input in place, which others still
            need. The message names the block.
    """
    longest = _with_layouts(_dry_run(blocks, inputs, entrances), blocks, inputs)
    if not any(spec.varies for spec in inputs.values()):
        return longest
    shorter = _dry_run(blocks, {name: _shortened(spec, lambda size: max(size - 1, 1)) for name, spec in inputs.items()})
    found = {name: _varying(longest[name], shorter[name], name) for name in longest}
    try:  # one less may make no difference behind a pooling
        half = _dry_run(blocks, {name: _shortened(spec, lambda size: -(-size // 2)) for name, spec in inputs.items()})
    except ConfigError:  # too short for this network, and perhaps for its data
        return found
    return {name: _varying(found[name], half[name], name) for name in found}


def _with_layouts(found: dict[str, Specs], blocks: Blocks, inputs: Specs) -> dict[str, Specs]:
    """The specs, with the maps (H, W, C) among them marked."""
    image = inputs[MAIN].shape
    maps = [spec.shape for specs in found.values() for spec in specs.values() if len(spec.shape) == 3]
    if len(image) != 3 or not any(_like_sides(shape[:2], image[1:]) for shape in maps):
        return found  # channels first, all of them
    larger = _of_larger_images(blocks, inputs)
    marked: dict[str, Specs] = {}
    for block, specs in found.items():
        marked[block] = {}
        for name, spec in specs.items():
            other = larger.get(block, {}).get(name)
            last = len(spec.shape) == 3 and _channels_last(spec.shape, other, image[1:])
            marked[block][name] = dataclasses.replace(spec, channels_last=last)
    return marked


def _of_larger_images(blocks: Blocks, inputs: Specs) -> dict[str, Specs]:
    """What the blocks give for images of twice the sides, up to the first one that cannot take them."""
    channels, *sides = inputs[MAIN].shape
    specs = {**inputs, MAIN: dataclasses.replace(inputs[MAIN], shape=(channels, *(2 * side for side in sides)))}
    dtype = next((p.dtype for block in blocks.values() for p in block.parameters()), torch.float32)
    flow = bare({name: blank(spec, ROWS, dtype, META) for name, spec in specs.items()})
    found = {}
    for name, block in blocks.items():
        stripped = without_weights(block).eval()
        try:
            with META, _ShapesOnly(), torch.no_grad():
                flow = _checked(stripped(flow), name)
        except Exception:  # whatever it is: a network may take images of one size only
            break
        found[name] = {key: TensorSpec(tuple(x.shape[1:]), x.dtype) for key, x in named(flow).items()}
    return found


def _channels_last(shape: tuple[int, ...], larger: TensorSpec | None, sides: tuple[int, ...]) -> bool:
    """Whether (H, W, C) is how a map is to be read: its first two axes grow with the image; or, where that is not
    known, they are to each other as the sides of the image and the last two are not."""
    if larger is not None and len(larger.shape) == 3:
        grows = [size != other for size, other in zip(shape, larger.shape, strict=True)]
        if grows in ([True, True, False], [False, True, True]):
            return grows[0]
    return _like_sides(shape[:2], sides) and not _like_sides(shape[1:], sides)


def _like_sides(axes: tuple[int, ...], sides: tuple[int, ...]) -> bool:
    """Whether two axes of a map are to each other as the sides of the image."""
    return axes[0] * sides[1] == axes[1] * sides[0]


def _shortened(spec: TensorSpec, shorter: Any) -> TensorSpec:
    shape = tuple(shorter(size) if axis in spec.varies else size for axis, size in enumerate(spec.shape))
    return dataclasses.replace(spec, shape=shape)


def _varying(longest: Specs, shorter: Specs, block: str) -> Specs:
    """The specs of a block with the axes that differ in a shorter batch."""
    if longest.keys() != shorter.keys() or any(len(longest[n].shape) != len(shorter[n].shape) for n in longest):
        raise ConfigError(
            f"block '{block}' gives {_show(longest)} for the longest batch and {_show(shorter)} for a shorter one; the "
            "names and the number of axes must be the same for every length"
        )
    found = {}
    for name, spec in longest.items():
        pairs = enumerate(zip(spec.shape, shorter[name].shape, strict=True))
        axes = {axis for axis, (size, other) in pairs if size != other}
        found[name] = dataclasses.replace(spec, varies=tuple(sorted(axes | set(spec.varies))))
    return found


def _show(specs: Specs) -> str:
    return " + ".join(f"{name} {spec.shape}" for name, spec in specs.items())


def _dry_run(blocks: Blocks, inputs: Specs, entrances: Collection[str] = ()) -> dict[str, Specs]:
    """One pass; the first block that cannot do it on the meta device, and all behind it, do it for real."""
    dtype = next((p.dtype for block in blocks.values() for p in block.parameters()), torch.float32)
    flow = bare({name: blank(spec, ROWS, dtype, META) for name, spec in inputs.items()})
    found = {}
    on_meta = True
    for name, block in blocks.items():
        given, before = flow, _versions(flow)
        if on_meta:
            try:
                with META, _ShapesOnly(), torch.no_grad():
                    flow = _checked(without_weights(block).eval()(given), name)
            except ConfigError:
                raise
            except Exception:  # whatever it is: the real block decides
                on_meta = False
        if not on_meta:
            given = _real(given, block)
            before = _versions(given)
            flow = _checked(_run(block, given, name), name)
        if name in entrances and _versions(given) != before:
            raise ConfigError(
                f"a local module begins with block '{name}', which changes its input in place; use inplace=False "
                "there or another cut"
            )
        found[name] = {key: TensorSpec(tuple(x.shape[1:]), x.dtype) for key, x in named(flow).items()}
    return found


class _ShapesOnly(TorchFunctionMode):
    """BatchNorm in evaluation gives what it is given, in shape and dtype; PyTorch finds that out on the meta device by
    all operations that it consists of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.batch_norm and _keeps_form(*args, **kwargs):
            return torch.empty_like(args[0])  # no view of it: what comes next may change it in place
        return func(*args, **kwargs)


def _keeps_form(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    **numbers: float,
) -> bool:
    """Whether ``torch.nn.functional.batch_norm`` with these arguments has statistics and factors that fit ``x``."""
    vectors = (mean, variance, weight, bias)
    return not training and x.dim() > 1 and all(
        v is not None and v.is_meta and v.shape == x.shape[1:2] and v.dtype == x.dtype for v in vectors
    )


def blank(spec: TensorSpec, rows: int, floating: torch.dtype, device: torch.device) -> Tensor:
    """Zeros (rows, *shape), an id that every table has; a mask that hides nothing."""
    dtype = floating if spec.dtype.is_floating_point else spec.dtype
    return torch.full((rows, *spec.shape), spec.dtype == torch.bool, dtype=dtype, device=device)


def _real(flow: Flow, block: nn.Module) -> Flow:
    """The same shapes on the device of the block."""
    device = next((tensor.device for tensor in (*block.parameters(), *block.buffers())), torch.device("cpu"))
    device = torch.device("cpu") if device == META else device
    tensors = {}
    for name, x in named(flow).items():
        spec = TensorSpec(tuple(x.shape[1:]), x.dtype)
        tensors[name] = blank(spec, ROWS, x.dtype, device) if x.is_meta else x
    return bare(tensors)


def _run(block: nn.Module, flow: Flow, name: str) -> Any:
    """What a block gives in evaluation mode; a planned one as a copy with weights of zero."""
    if any(tensor.is_meta for tensor in (*block.parameters(), *block.buffers())):
        block = copy.deepcopy(block).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*block.parameters(), *block.buffers()):
                tensor.zero_()
    modes = {module: module.training for module in block.modules()}
    try:
        with torch.no_grad():
            return block.eval()(flow)
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"block '{name}' fails on an input of shape {_shapes(flow)}: {cause}") from error
    finally:
        for module, training in modes.items():
            module.training = training


def _shapes(flow: Flow) -> str:
    tensors = named(flow)
    if tensors.keys() == {MAIN}:
        return str(tuple(tensors[MAIN].shape[1:]))
    return " + ".join(f"{name} {tuple(x.shape[1:])}" for name, x in tensors.items())


def _checked(output: Any, block: str) -> Flow:
    """``output``, if it is what a block may give."""
    if not isinstance(output, Tensor | dict):
        raise ConfigError(f"block '{block}' gives {_kind(output)}; {_ACCEPTED}")
    tensors: Tensors = named(output)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"block '{block}' gives a tensor named {name!r}; {_ACCEPTED}, named by identifiers")
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"block '{block}' gives {_kind(tensor)} as '{name}'; {_ACCEPTED}")
        if tensor.dim() == 0 or len(tensor) != ROWS:
            shape = f"shape {tuple(tensor.shape)}" if tensor.dim() else "no axis"
            raise ConfigError(f"block '{block}' gives '{name}' of {shape} for {ROWS} samples; {_ACCEPTED}")
    if MAIN not in tensors:
        raise ConfigError(f"block '{block}' gives a dict of {', '.join(tensors) or 'nothing'}; {_ACCEPTED}")
    return bare(tensors)


_ACCEPTED = "a block gives one tensor, or a dict of named tensors with 'x' among them, each with a row per sample"


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _versions(flow: Flow) -> list[int]:
    return [x._version for x in named(flow).values()]
