"""The forward of a network as a graph of steps, made by torch.fx: which module or function makes what, who uses it.

    image --> conv1 --> bn1 --> relu --> maxpool --> layer1.0 --> ... --> avgpool --> flatten --> fc --> scores

Only what holds the places to cut at is *opened*, so that its own steps are seen; every other module is one step and
stays as it is, control flow, hooks and randomness included.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

STEPS = ("call_module", "call_function", "call_method")
_NETWORK, _IMAGE = "network", "image"


class Untraceable(Exception):
    """An opened module whose forward torch.fx cannot follow.

    Attributes:
        module: its path in the network, "" for the network itself.
        cause: where and why, in a few words.
    """

    def __init__(self, module: str, cause: str) -> None:
        super().__init__(cause)
        self.module = module
        self.cause = cause


@dataclass(frozen=True)
class ForwardGraph:
    """
    Attributes:
        image: the node of the input.
        steps: in the order in which they run.
        result: what the forward returns: a node, or anything else that holds nodes.
        enters: node -> paths of the modules that begin with it, the outermost first, each named at its first use.
        inside: node -> path of the opened module whose forward makes it.
        takes: path of a module -> the node that is its first argument, at its first call.
        constants: tensors that the forward itself makes, by their names as targets of ``get_attr``.
    """

    image: fx.Node
    steps: tuple[fx.Node, ...]
    result: Any
    enters: dict[fx.Node, tuple[str, ...]]
    inside: dict[fx.Node, str]
    takes: dict[str, fx.Node]
    constants: dict[str, Tensor]

    def name(self, node: fx.Node) -> str:
        """A name of its own, an identifier: ``image``, ``layer1_0``, ``add_2``."""
        if node is self.image:
            return _IMAGE
        others = {_IMAGE, self.image.name, *(step.name for step in self.steps)}
        short = node.name.removeprefix(f"{_NETWORK}_")
        return node.name if short in others else short

    def maker(self, node: fx.Node) -> str:
        """A node for people: ``'layer1.0'``, ``add in 'encoder'``, ``the image``."""
        if node is self.image:
            return "the image"
        if node.op == "call_module":
            return f"'{node.target}'"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        inside = self.inside.get(node, "")
        return f"{name} in '{inside}'" if inside else f"{name} in the network's forward"

    def is_batch_size(self, node: fx.Node) -> bool:
        """Whether it is the number of images in the batch, or the image's shape where only this number of it is used:
        whatever flows downstream knows it as well."""
        if node.op == "call_method" and node.target == "size":
            return node.args == (self.image, 0) and not node.kwargs
        if node.op != "call_function":
            return False
        if node.target is operator.getitem:
            return self._is_shape(node.args[0]) and node.args[1:] == (0,)
        return self._is_shape(node) and all(map(self.is_batch_size, node.users))

    def _is_shape(self, value: object) -> bool:
        return isinstance(value, fx.Node) and value.target is getattr and value.args == (self.image, "shape")


def forward_graph(network: nn.Module, opened: Collection[str]) -> ForwardGraph:
    """Trace the forward of ``network``, in its mode (training or not), with its image as the only argument.

    Args:
        opened: paths of the modules whose own steps are wanted; "" is the network.

    Raises:
        Untraceable: an opened module branches on values, or does something else that torch.fx cannot follow.
    """
    tracer = _Tracer(opened)
    whole = _Whole(network)
    try:
        graph = tracer.trace(whole)
    except Exception as error:  # whatever a forward does with a value that has no numbers
        raise Untraceable(tracer.failed, _where(error)) from error
    constants = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            assert isinstance(node.target, str)
            if not node.target.startswith(f"{_NETWORK}."):
                constants[node.target] = getattr(whole, node.target)
            node.target = _own(node.target)
    image, *_ = graph.nodes
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    steps = tuple(node for node in graph.nodes if node.op in STEPS)
    return ForwardGraph(image, steps, result, tracer.enters, tracer.inside, tracer.takes, constants)


class _Whole(nn.Module):
    """Calls the network with an image alone: its other arguments keep their defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.network(x)
        return scores


class _Tracer(fx.Tracer):
    """Opens what it is told to, and notes which modules a step begins."""

    proxy_buffer_attributes = True

    def __init__(self, opened: Collection[str]) -> None:
        super().__init__()
        self.failed = ""
        self.enters: dict[fx.Node, tuple[str, ...]] = {}
        self.inside: dict[fx.Node, str] = {}
        self.takes: dict[str, fx.Node] = {}
        self._opened = opened
        self._stack = [""]
        self._entered: list[str] = []  # opened modules that have made no step yet
        self._seen: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _own(module_qualified_name) not in self._opened

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = _own(self.path_of_module(m))
        first = next(iter((*args, *kwargs.values())), None)
        if isinstance(first, fx.Proxy):
            self.takes.setdefault(path, first.node)
        if path not in self._opened:
            return super().call_module(m, forward, args, kwargs)
        self._stack.append(path)
        self._entered.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or path
            raise
        if path in self._entered:
            self._entered.remove(path)
        self._stack.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)  # torch.fx knows shapes of parameters only
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind in STEPS:
            entered = self._entered + ([_own(target)] if kind == "call_module" else [])
            self.enters[node] = tuple(path for path in entered if path and path not in self._seen)
            self.inside[node] = self._stack[-1]
            self._seen.update(entered)
            self._entered.clear()
        return node


def _own(target: str) -> str:
    """A path below the wrapper as the network itself has it."""
    return target.removeprefix(_NETWORK).removeprefix(".")


def _where(error: Exception) -> str:
    """``net.py:12: symbolically traced variables cannot be used as inputs to control flow``."""
    library = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(library) and frame.filename != __file__
    ]
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {text}" if frames else text

