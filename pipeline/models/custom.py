"""Any ``nn.Module`` as blocks: its forward is traced and cut at modules that are named, or wherever one tensor flows.

    model.cuts = ["layer1", "layer2.1"]    conv1 bn1 relu maxpool | layer1 layer2.0 | layer2.1 ... flatten fc
    model.cuts = "even", model.modules = 3  conv1 .. | layer1.0 | layer1.1 | ... | layer4.1 .. | fc, joined evenly

A cut begins a local module with the module that it names; functions between two modules (flatten, add, a class token
that is concatenated) go with the module before them. Where more than one tensor is needed behind a cut (a skip
connection, a mask), a named set flows: "x" is what the module behind the cut takes first. The blocks run the network's
own modules on its own weights: training changes these, and files of weights have the names of its own ``state_dict``.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from pipeline.base.errors import ConfigError, suggest
from pipeline.base.flow import MAIN
from pipeline.models.backbones import Blocks, UncutModel, blocks_of
from pipeline.models.cut_points import CutPoints, pieces
from pipeline.models.forward_graph import ForwardGraph, Untraceable, forward_graph
from pipeline.models.part import ROOT, Part, Program, place_tensor


def network_blocks(
    network: nn.Module, cuts: str | tuple[str, ...] = "auto", image_shape: tuple[int, ...] | None = None
) -> Blocks:
    """A user's network in blocks, which hold its own modules and weights, not copies.

    Args:
        network: an ``nn.Sequential`` is cut between its children, another module where its traced forward allows it;
            one that cannot be traced is taken as the chain of its children.
        cuts: ``model.cuts``; names make one block of every local module, a word leaves all places open.
        image_shape: (C, H, W); where it is known, a chain of children is compared with the network itself.

    Raises:
        ConfigError: an unknown name, a cut that is crossed by what is no tensor or divides shared weights, a forward
            that cannot be traced and is no chain, one that does not return one tensor. The line says where and what to
            do.
    """
    if not isinstance(network, nn.Module):
        raise ConfigError(f"the network is a {type(network).__name__}; pass an nn.Module")
    names = cuts if isinstance(cuts, tuple) else ()
    _refuse_unknown(network, names)
    children = dict(network.named_children())
    if isinstance(network, nn.Sequential) and _is_chain(network) and all(name in children for name in names):
        return blocks_of(network)
    needed = {""} | {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
    try:
        graphs = _traced(network, needed | set(_containers(network)), needed)
    except Untraceable as error:
        return _chain(network, names, error, image_shape)
    points = {mode: CutPoints(network, graph) for mode, graph in graphs.items()}
    for graph in graphs.values():
        _refuse_result(network, graph)
    if names:
        for every in points.values():
            every.check(names)
    else:
        names = tuple(name for name in points[True].weighty() if _alike(points, name))
    return _parts(network, points, names)


def _parts(network: nn.Module, points: dict[bool, CutPoints], names: tuple[str, ...]) -> Blocks:
    """A part of every piece, under the name of the module it begins with."""
    first = points[True].first_name(names)
    flows = [(MAIN, *map(points[True].graph.name, points[True].flow(name)[1:])) for name in names]
    for name in names:
        if not _alike(points, name):
            raise ConfigError(
                f"model.cuts: other values cross a cut before '{name}' in training than in evaluation; cut elsewhere"
            )
    programs = {
        mode: [Program(every.graph, *piece) for piece in pieces(every, names, flows)] for mode, every in points.items()
    }
    blocks: Blocks = OrderedDict()
    for index, (name, takes) in enumerate(zip((first, *names), [(MAIN,), *flows], strict=True)):
        blocks[name] = Part(network, takes, {mode: parts[index] for mode, parts in programs.items()})
    _keep_unused(network, list(blocks.values()))
    return blocks


def _alike(points: dict[bool, CutPoints], name: str) -> bool:
    """Whether a cut works in training and in evaluation, and as many tensors flow there."""
    counts = [len(every.crossing(every.beginnings[name])) for every in points.values() if name in every.beginnings]
    return len(counts) == len(points) and len(set(counts)) == 1 and points[False].works(points[False].beginnings[name])


def _keep_unused(network: nn.Module, parts: list[nn.Module]) -> None:
    """Weights that the forward does not use belong to the state of the network as well: they go to the part that uses
    them under another name, or to the last one."""
    held = {key.removeprefix(f"{ROOT}."): part for part in parts for key in part.state_dict()}
    users = {id(tensor): part for part in parts for tensor in (*part.parameters(), *part.buffers())}
    for path, tensor in network.state_dict(keep_vars=True).items():
        if path not in held and isinstance(tensor, torch.Tensor):
            place_tensor(users.get(id(tensor), parts[-1]).get_submodule(ROOT), path, network)


# --- tracing ----------------------------------------------------------------------------------------------------------


def _traced(network: nn.Module, opened: Collection[str], needed: Collection[str]) -> dict[bool, ForwardGraph]:
    """The forward in training and in evaluation. What cannot be traced stays closed, if no cut needs it open."""
    opened = set(opened)
    while True:
        try:
            with _kept_mode(network):
                return {mode: forward_graph(network.train(mode), opened) for mode in (True, False)}
        except Untraceable as error:
            if error.module in needed:
                raise
            opened.remove(error.module)


@contextmanager
def _kept_mode(network: nn.Module) -> Iterator[None]:
    """Leaves every module in the mode, training or not, that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _containers(network: nn.Module, path: str = "") -> Iterator[str]:
    """Paths of the modules that only hold a row of others: plain ``nn.Sequential``, and what holds such a row, such as
    an encoder. What stands in a row (a residual block) stays whole."""
    row = _is_row(network)
    for name, child in network.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield from _containers(child, below)
        elif _is_chain(child) or (not row and any(map(_is_row, child.modules()))):
            yield below
            yield from _containers(child, below)


def _is_row(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


# --- the module tree --------------------------------------------------------------------------------------------------


def _chain(
    network: nn.Module, names: tuple[str, ...], why: Untraceable, image_shape: tuple[int, ...] | None
) -> Blocks:
    """The children of a network, those of plain ``nn.Sequential`` among them in their place, as blocks."""
    blocks: Blocks = OrderedDict(_row(network, ""))
    beginnings = {".".join(name.split(".")[:depth]) for name in blocks for depth in range(1, name.count(".") + 2)}
    complete = {f"{name}.{key}" for name, block in blocks.items() for key in block.state_dict()} == set(
        network.state_dict()
    )
    agree = complete and (image_shape is None or _agree(network, blocks, image_shape))
    if not blocks or not agree or not set(names) <= beginnings:
        where = f"'{why.module}' of {type(network).__name__}" if why.module else type(network).__name__
        raise ConfigError(
            f"the forward of {where} cannot be traced ({why.cause}) and is no chain of its children; move what "
            "branches into a module of its own, which stays whole, or pass an nn.Sequential"
        )
    return blocks


def _row(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if _is_chain(child):
            yield from _row(child, below)
        else:
            yield below, child


def _agree(network: nn.Module, blocks: Blocks, image_shape: tuple[int, ...]) -> bool:
    """Whether network and chain compute the same of two random images, bit for bit."""
    chain = UncutModel(blocks)
    like = next(network.parameters(), torch.zeros(()))
    with _kept_mode(network), torch.no_grad(), torch.random.fork_rng(devices=[]):
        x = torch.randn(2, *image_shape).to(like)
        expected = network.eval()(x.clone())
        try:
            result = chain.eval()(x)
        except (RuntimeError, ValueError, TypeError):
            return False
    return isinstance(expected, torch.Tensor) and isinstance(result, torch.Tensor) and torch.equal(result, expected)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refuse_unknown(network: nn.Module, names: tuple[str, ...]) -> None:
    known = [name for name, _ in network.named_modules() if name]
    for name in names:
        if name not in known:
            near = [valid for valid in known if valid.count(".") <= name.count(".")]
            raise ConfigError(f"model.cuts: {type(network).__name__} has no module '{name}'; {suggest(name, near)}")


def _refuse_result(network: nn.Module, graph: ForwardGraph) -> None:
    if not isinstance(graph.result, fx.Node):
        kind = type(graph.result).__name__
        where = inspect.getsourcefile(type(network)) or "its source"
        raise ConfigError(
            f"{type(network).__name__} ({where}) returns a {kind}, but the last block must give class scores alone; "
            "pass a network whose forward returns one tensor"
        )
