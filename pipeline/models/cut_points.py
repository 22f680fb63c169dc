"""Where the forward of a network can be cut: between two steps where all that the rest needs are tensors.

    layer1.0 --> conv1 --> bn1 --> relu --> conv2 --> bn2 --> add --> relu --> layer1.2
             |      2       2       2         2        2       |   1        1            tensors flow at a cut there
             +-------------------- the shortcut ---------------+

Several flow as a named set: "x" is what the module behind the cut takes first.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, fx, nn

from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN
from pipeline.models.forward_graph import ForwardGraph
from pipeline.models.part import Values


class CutPoints:
    """The places of one traced forward. Place p is before step p; everything before it is one side, the rest the other.

    Args:
        network: the network itself.
        graph: its forward.

    Attributes:
        beginnings: module -> the place where it begins.
    """

    def __init__(self, network: nn.Module, graph: ForwardGraph) -> None:
        self.graph = graph
        self._kind = type(network).__name__
        self._network = network
        self._index = {node: index for index, node in enumerate(graph.steps)}
        self._index[graph.image] = -1
        self.beginnings = {path: self._index[node] for node, paths in graph.enters.items() for path in paths}

    def crossing(self, place: int) -> list[fx.Node]:
        """Values that are made before ``place`` and used behind it, the newest last."""
        return [node for node, (made, used) in self._lives.items() if made < place <= used]

    def flow(self, name: str) -> list[fx.Node]:
        """Values that cross the cut before module ``name``; the one that it takes first leads."""
        values = self.crossing(self.beginnings[name])
        main = self.graph.takes.get(name)
        main = main if main in values else values[-1]
        return [main, *(value for value in values if value is not main)]

    def works(self, place: int) -> bool:
        """Whether only tensors cross ``place``, and no weight is used on both sides."""
        values = self.crossing(place)
        return bool(values) and not any(self._is_no_tensor(v, place) for v in values) and not self.separated(place)

    def separated(self, place: int) -> list[str]:
        """Names of weights that are used on both sides of ``place``."""
        return [name for name, (first, last) in self._uses.values() if first < place <= last]

    def weighty(self) -> list[str]:
        """The modules with a matrix of weights, after the first one, before which a cut works and the fewest tensors
        flow: norms, activations, pooling and functions follow the module before them."""
        found: dict[str, int] = {}
        started = False
        for place, node in enumerate(self.graph.steps):
            if node.op != "call_module" or not self.graph.enters[node]:
                continue
            module = self._network.get_submodule(str(node.target))
            if any(parameter.dim() > 1 for parameter in module.parameters()):
                if started and self.works(place):
                    found[str(node.target)] = len(self.crossing(place))
                started = True
        return [name for name, count in found.items() if count == min(found.values())]

    def first_name(self, cuts: Sequence[str]) -> str:
        """The first module that begins before the first cut, or the first function where none does."""
        for node in self.graph.steps[: self.beginnings[cuts[0]] if cuts else None]:
            if self.graph.enters[node]:
                return self.graph.enters[node][-1]
        return self.graph.steps[0].name

    def check(self, names: Iterable[str]) -> None:
        """Whether the forward can be cut before each of these modules.

        Raises:
            ConfigError: a module is not called, two begin at the same place or in another order, a cut is crossed by
                what is no tensor or separates shared weights. The line says what crosses, and which cuts near it work.
        """
        found: dict[int, str] = {}
        for name in names:
            if name not in self.beginnings:
                raise ConfigError(
                    f"model.cuts: '{name}' is never called as a module in the forward of {self._kind}, so no local "
                    "module can begin with it; name one that is called"
                )
            place = self.beginnings[name]
            if place == 0 or place in found:
                other = f"'{found[place]}'" if place else "the network itself"
                raise ConfigError(f"model.cuts: '{name}' begins where {other} begins; remove one of the two cuts")
            self._refuse(name, place)
            if found and place < max(found):
                raise ConfigError(
                    f"model.cuts: '{name}' begins before '{found[max(found)]}'; give the names in the order in which "
                    "the modules run"
                )
            found[place] = name

    def _refuse(self, name: str, place: int) -> None:
        if shared := self.separated(place):
            raise ConfigError(
                f"model.cuts: a cut before '{name}' separates two uses of '{shared[0]}', which are trained together; "
                f"{self._instead(place)}"
            )
        if self.works(place):
            return
        values = self.crossing(place) or [self.graph.image]
        value = next((value for value in values if self._is_no_tensor(value, place)), values[-1])
        user = min((user for user in value.users if self._place_of(user) >= place), key=self._place_of)
        used = "the network returns" if user.op == "output" else f"{self.graph.maker(user)} uses"
        behind = " behind it" if user.op != "output" else ""
        raise ConfigError(
            f"model.cuts: a cut before '{name}' is crossed by what is no tensor: {used} the output of "
            f"{self.graph.maker(value)}{behind}; {self._instead(place)}"
        )

    def _instead(self, place: int) -> str:
        """The nearest cuts that work, before and after."""
        named: dict[int, str] = {}
        for path, where in self.beginnings.items():
            if where > 0 and self.works(where):
                named.setdefault(where, path)
        near = [max((p for p in named if p < place), default=0), min((p for p in named if p > place), default=0)]
        names = [f"'{named[p]}'" for p in near if p]
        return f"cut before {' or '.join(names)} instead" if names else "no other cut works, so use model.modules=1"

    def _is_no_tensor(self, node: fx.Node, place: int) -> bool:
        """A shape, a number made of one, or a tuple, whose entries are used one by one behind ``place``."""
        return self._is_size(node) or any(
            user.target is operator.getitem and isinstance(user.args[1], int) and self._place_of(user) >= place
            for user in node.users
        )

    def _is_size(self, node: fx.Node) -> bool:
        """The shape of a tensor, an entry of it, or what Python's operators make of such."""
        if node.op == "call_method":
            return node.target in ("size", "dim", "numel")
        if node.op != "call_function":
            return False
        if node.target is getattr:
            return True
        of_python = getattr(node.target, "__module__", "") in (operator.__name__, "_operator", "builtins", "math")
        return of_python and bool(node.all_input_nodes) and all(map(self._is_size, node.all_input_nodes))

    def _place_of(self, user: fx.Node) -> int:
        return self._index.get(user, len(self.graph.steps))

    @functools.cached_property
    def _lives(self) -> dict[fx.Node, tuple[int, int]]:
        """Value -> where it is made, and where it is used last. The number of images in a batch is known everywhere."""
        lives = {}
        for node in (self.graph.image, *self.graph.steps):
            if not self.graph.is_batch_size(node):
                users = [self._place_of(user) for user in node.users if not self.graph.is_batch_size(user)]
                lives[node] = (self._index[node], max(users, default=-1))
        return lives

    @functools.cached_property
    def _uses(self) -> dict[int, tuple[str, tuple[int, int]]]:
        """Identity of every parameter and buffer -> its name, and its first and last step."""
        uses: dict[int, tuple[str, tuple[int, int]]] = {}
        for place, node in enumerate(self.graph.steps):
            for name, tensor in self._tensors(node):
                known, (first, _) = uses.get(id(tensor), (name, (place, place)))
                uses[id(tensor)] = known, (first, place)
        return uses

    def _tensors(self, node: fx.Node) -> Iterator[tuple[str, Tensor]]:
        if node.op == "call_module":
            module = self._network.get_submodule(str(node.target))
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                yield f"{node.target}.{name}", tensor
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and argument.target not in self.graph.constants:
                path, _, name = str(argument.target).rpartition(".")
                yield str(argument.target), getattr(self._network.get_submodule(path), name)


def pieces(
    points: CutPoints, cuts: Sequence[str], flows: Sequence[Sequence[str]]
) -> Iterator[tuple[Sequence[fx.Node], Values, Values]]:
    """Steps, inputs and outputs of every piece; ``flows``: names of the values that cross each of the cuts."""
    graph, bounds = points.graph, [0, *(points.beginnings[name] for name in cuts), len(points.graph.steps)]
    crossing = [dict(zip(names, points.flow(cut), strict=True)) for cut, names in zip(cuts, flows, strict=True)]
    values = [{MAIN: graph.image}, *crossing, {MAIN: graph.result}]
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield graph.steps[start:stop], values[index], values[index + 1]
