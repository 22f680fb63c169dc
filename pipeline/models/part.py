"""A part of a network's forward as a block: consecutive steps of its graph, with the modules and weights they use.

    Part "layer2.1"   /  layer2  1        the network's own modules, under their own paths, not copies
                                 2        weights of opened modules stand beside them: encoder.pos_embedding

The one child is called "/", which is no name in Python: what follows it in a state dict is the network's own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.base.flow import Flow, Tensors, bare, named
from pipeline.models.forward_graph import ForwardGraph

ROOT = "/"
_BEFORE = f".{ROOT}."
Values = Mapping[str, fx.Node]
"""Of a traced forward, by the names under which they flow."""


def uncut_name(key: str) -> str:
    """The state-dict key of the un-cut network for ``<block>.<name>``: of a :class:`Part` what follows the "/"."""
    return key.rpartition(_BEFORE)[2]


class Part(nn.Module):
    """Runs some steps of a network: a tensor (B, ...) or a named set of them -> the same.

    Args:
        network: the whole; its modules and weights are used as they are.
        takes: names of the tensors that flow in.
        programs: training or not -> its steps in this mode.
    """

    def __init__(self, network: nn.Module, takes: Sequence[str], programs: Mapping[bool, Program]) -> None:
        super().__init__()
        self._takes = tuple(takes)
        root = nn.Module()
        self.add_module(ROOT, root)
        for program in programs.values():
            for path in program.modules:
                _place_module(root, path, network.get_submodule(path))
            for path in program.tensors:
                place_tensor(root, path, network)
            for path, constant in program.constants.items():
                root.register_buffer(path, constant, persistent=False)
        self._functions = {mode: _function(root, program.graph) for mode, program in programs.items()}
        self.train(network.training)

    def forward(self, flow: Flow) -> Flow:
        tensors = named(flow)
        run = self._functions[self.training]
        return bare(run(self.get_submodule(ROOT), *(tensors[name] for name in self._takes)))


class Program:
    """The steps of a part in one mode, and what they need.

    Args:
        whole: what they are steps of.
        steps: consecutive ones.
        sources: the values that flow in, by name.
        results: the values that flow out, by name.

    Attributes:
        graph: of the part alone.
        modules: paths of the modules that are called.
        tensors: paths of the parameters and buffers that functions use.
        constants: tensors that the forward itself makes.
    """

    def __init__(
        self, whole: ForwardGraph, steps: Sequence[fx.Node], sources: Values, results: Values
    ) -> None:
        self.graph = fx.Graph()
        self.modules: list[str] = []
        self.tensors: list[str] = []
        self.constants: dict[str, Tensor] = {}
        self._whole = whole
        self._copies = {node: self.graph.placeholder(name) for name, node in sources.items()}
        self._batch = next(iter(self._copies.values()))
        for node in steps:
            if whole.is_batch_size(node):
                continue  # copied where it is used
            copy = self._copies[node] = self.graph.node_copy(node, self._copy)
            if copy.target == "view" and not isinstance(copy.args[1], torch.dtype):
                copy.target = "reshape"  # the same, for channels last too
            if node.op == "call_module":
                self.modules.append(str(node.target))
        self.graph.output({name: self._copies[node] for name, node in results.items()})

    def _copy(self, node: fx.Node) -> fx.Node:
        """The copy of an argument: it is there, or it is a weight, or the number of images in the batch."""
        if node not in self._copies and node.op == "get_attr":
            path = str(node.target)
            if path in self._whole.constants:
                self.constants[path] = self._whole.constants[path]
            else:
                self.tensors.append(path)
            self._copies[node] = self.graph.node_copy(node)
        elif node not in self._copies and self._whole.is_batch_size(node):
            self._copies[node] = self.graph.call_method("size", (self._batch, 0))
        return self._copies[node]


def _function(root: nn.Module, graph: fx.Graph) -> Callable[..., Tensors]:
    """The Python function of a graph; its first argument holds the modules and the weights, the others flow in."""
    return type(fx.GraphModule(root, graph)).forward


def _parent(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    *way, name = path.split(".")
    for step in way:
        if step not in dict(root.named_children()):
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    return root, name


def _place_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, name = _parent(root, path)
    parent.add_module(name, module)


def place_tensor(root: nn.Module, path: str, network: nn.Module) -> None:
    """Register the network's own parameter or buffer ``path`` under the same path, persistent as it is there."""
    parent, name = _parent(root, path)
    owner = network.get_submodule(path.rpartition(".")[0])
    value: Any = getattr(owner, name)
    if isinstance(value, nn.Parameter):
        parent.register_parameter(name, value)
    else:
        parent.register_buffer(name, value, persistent=name not in owner._non_persistent_buffers_set)
