"""ReLU branches that float32 leaves open, and the search for the branches a reference took.

A pre-activation within rounding noise of 0 falls on one side of the kink with one vector width of the CPU
and on the other side with another. The output is 0 up to rounding either way, but the gradient passes or
does not: one such unit moves the gradients of the layers below it by 1e-4 to 1e-3. At these *ambiguous*
units the branch is a free choice.

The choice is read off the reference, not tried out. Below every ReLU lies a BatchNorm or Linear layer whose
bias gradient is, per channel, the sum of the gradient over the channel's units. The backward pass visits
ReLUs from the last to the first, so at each one everything above is settled, and the reference's bias
gradient tells which of the channel's few ambiguous units took the other branch. The gradients of all other
parameters are an independent check of the choice.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.local.local_module import LocalModule
from pipeline.models.backbones import BasicBlock
from pipeline.stage.schedule import Action, Kind

NOISE_FACTOR = 5.0
"""A unit is ambiguous if |z| <= this * rms(float32 - float64) of its channel. The difference of two
independent float32 results has sqrt(2) times that rms, so this is 3.5 standard deviations of it."""
FLIP_GAIN = 3e-6
"""A flip must explain at least this share of the norm of the bias gradient; less is rounding."""


@dataclass
class Site:
    """One application of a ReLU in a step: pre-activation ``z`` (B, C, ...) and the branches chosen at it.

    ``target`` is the reference's gradient of the bias just below, (C,). ``noise`` (1, C, ...) is the rms
    rounding error of ``z``, without which nothing is ambiguous. ``flips`` are the flat indices of the units
    that take the other branch.
    """

    name: str
    target: Tensor
    z: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    noise: Tensor | None = None
    flips: tuple[int, ...] = ()

    def ambiguous(self) -> list[int]:
        """Flat indices of the units whose branch is decided by rounding."""
        if self.noise is None:
            return []
        return (self.z.abs() <= NOISE_FACTOR * self.noise).flatten().nonzero().flatten().tolist()

    def mask(self) -> Tensor:
        """Where the gradient passes."""
        passes = self.z > 0
        for unit in self.flips:
            passes.view(-1)[unit] ^= True
        return passes

    def choose(self, gradient: Tensor) -> None:
        """Set ``flips`` to the ambiguous units that best explain ``target`` with this gradient from above."""
        self.flips = ()
        passing = (gradient * self.mask()).double().sum(dim=_all_but_channels(self.z))
        missing = (self.target.double() - passing).tolist()
        price = FLIP_GAIN * float(self.target.double().norm())
        effect = torch.where(self.z > 0, -gradient, gradient).flatten()
        for channel, units in itertools.groupby(sorted(self.ambiguous(), key=self._channel), self._channel):
            effects = {unit: float(effect[unit]) for unit in units}
            costs = {
                subset: abs(missing[channel] - sum(effects[unit] for unit in subset)) + price * len(subset)
                for subset in _subsets(tuple(effects))
            }
            self.flips += min(costs, key=costs.__getitem__)

    def _channel(self, unit: int) -> int:
        return unit // self.z[0, 0].numel() % self.z.size(1)


class _KinkedReLU(torch.autograd.Function):
    """ReLU whose backward asks its site for the branches."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, site: Site, kinks: Kinks) -> Tensor:
        ctx.site, ctx.kinks = site, kinks
        site.z = z.detach().contiguous()
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.kinks.searching and not ctx.kinks.relaying:
            ctx.site.choose(gradient)
        return gradient * ctx.site.mask(), None, None


class _ReLUWithSites(nn.Module):
    """Stands in for an nn.ReLU that is applied ``len(sites)`` times in a step."""

    def __init__(self, sites: list[Site], kinks: Kinks) -> None:
        super().__init__()
        self._next_site: Iterator[Site] = itertools.cycle(sites)
        self._kinks = kinks

    def forward(self, z: Tensor) -> Tensor:
        site = next(self._next_site)
        parts = z.chunk(z.size(1) // len(site.target), dim=1)  # more than one: of as many heads at once
        peers = self._kinks.peers(site, len(parts))
        return torch.cat([_KinkedReLU.apply(*pair, self._kinks) for pair in zip(parts, peers, strict=True)], dim=1)


class Kinks:
    """All ReLU sites of some local modules; replaces the modules' nn.ReLU children by its own.

    Args:
        modules: the modules to change.
        target: the reference's gradient of a bias.
    """

    def __init__(self, modules: Iterable[LocalModule], target: Callable[[nn.Parameter], Tensor]) -> None:
        self.sites: list[Site] = []
        self.searching = False
        self.relaying = False
        for module in modules:
            for name, part in (*module.blocks.items(), *module.levels.items()):
                for path, parent in list(part.named_modules()):
                    self._replace(parent, f"module {module.plan.index}: {name} {path}", target)

    def _replace(self, parent: nn.Module, where: str, target: Callable[[nn.Parameter], Tensor]) -> None:
        below: nn.Module | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                uses = [parent.bn1, parent.bn2] if isinstance(parent, BasicBlock) else [below]
                sites = [Site(f"{where}.{name} use {i}", target(use.bias)) for i, use in enumerate(uses)]
                setattr(parent, name, _ReLUWithSites(sites, self))
                self.sites += sites
            below = child

    def peers(self, site: Site, count: int) -> list[Site]:
        """The sites at the same place of ``count`` of a patched term's heads in turn; ``site`` is that of the first."""
        if count == 1:
            return [site]
        before, first, behind = re.split(r"(?<=heads\.)(\d+)", site.name, maxsplit=1)
        names = [f"{before}{int(first) + index}{behind}" for index in range(count)]
        return [next(s for s in self.sites if s.name == name) for name in names]

    def before_action(self, step: int, action: Action) -> None:
        """Stage hook: a relay carries a part of the gradient only, so it must use, not choose, branches."""
        self.relaying = action.kind is Kind.RELAY

    def noise_against(self, exact: Kinks) -> tuple[Tensor, ...]:
        """The noise of every site, from the same step in float64."""
        errors = [site.z.double() - other.z for site, other in zip(self.sites, exact.sites, strict=True)]
        return tuple(e.square().mean(dim=_all_but_channels(e), keepdim=True).sqrt().float() for e in errors)

    def set_noise(self, noise: Iterable[Tensor]) -> None:
        """Let the units within this noise be ambiguous."""
        for site, value in zip(self.sites, noise, strict=True):
            site.noise = value

    def units(self) -> int:
        """ReLU units of a step."""
        return sum(site.z.numel() for site in self.sites)

    def ambiguous(self) -> set[tuple[str, int]]:
        """(site, unit) of every ambiguous unit."""
        return {(site.name, unit) for site in self.sites for unit in site.ambiguous()}

    def flips(self) -> set[tuple[str, int]]:
        """(site, unit) of every unit that takes the other branch."""
        return {(site.name, unit) for site in self.sites for unit in site.flips}


def _all_but_channels(z: Tensor) -> list[int]:
    return [0, *range(2, z.dim())]


def _subsets(units: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All subsets, small ones first."""
    assert len(units) <= 10, f"{len(units)} ambiguous units in one channel: the noise is not small"
    return itertools.chain.from_iterable(itertools.combinations(units, n) for n in range(len(units) + 1))
