"""A method says which auxiliary heads a local module gets, and with which weights.

method            terms of the local loss on the module's output h
----------------  ------------------------------------------------------------------------------
dgl               1 x cross-entropy of an MLP / CNN head                      (Belilovsky et al. 2020)
greedy            1 x cross-entropy of pool + linear (0c1f)
infopro           l1 x reconstruction of the image + l2 x cross-entropy       (Wang et al. 2021)
infopro-contrast  l1 x reconstruction of the image + l2 x supervised contrast
predsim           b x similarity matching + (1 - b) x cross-entropy           (Nokland & Eidnes 2019)
auglocal          1 x cross-entropy of copies of later blocks, pool + linear  (Ma et al. 2024)
deinforeg         variance + covariance + label-invariance of a projection    (Huang et al. 2025)
lopt              mean square of a reconstruction of the module's input       (Shi et al. 2026)

With any of them: copies of the next block before the heads (MAN, see man), reconciled gradients (SGR, see sgr).

For another task than classification its loss stands in place of the cross-entropy, on a head that the task brings.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.base.config import (
    DGL_HEADS,
    FCN_HEAD,
    IMAGENET_HEAD,
    METHODS,
    TUNED_LAYERS,
    Config,
    LevelWeight,
    MethodConfig,
)
from pipeline.base.errors import ConfigError, suggest
from pipeline.base.flow import LABEL, Tensors
from pipeline.local import auglocal, deinforeg, lopt, man
from pipeline.local.level_weights import level_weight
from pipeline.local.roles import ModulePlan, lambda_position
from pipeline.local.task import Classification, Task
from pipeline.local.term import Term, Terms
from pipeline.local.upstream import Upstream
from pipeline.models import heads
from pipeline.models.backbones import initialise
from pipeline.models.dense_heads import FcnHead
from pipeline.models.heads import AuxiliaryHead, FeatureShape, Given
from pipeline.models.imagenet_heads import LAST_WIDTHS, StepwiseDecoderHead, imagenet_head
from pipeline.models.later import LaterBlock
from pipeline.models.layers import VectorInput
from pipeline.models.losses import full
from pipeline.models.patch_rows import AsRows
from pipeline.models.patches import Autocast, PatchedHead, backward_together, patch_shape
from pipeline.models.sequence_heads import IdsHead, SequenceSimilarityHead
from pipeline.models.spread import Gradient, whole
from pipeline.models.tokens import Reading, reading_of
from pipeline.models.tuned import use_plain

RECONSTRUCTION = "reconstruction"
DEFAULT_HEADS = {"dgl": "mlp-sr", "greedy": "0c1f", "infopro": "1c2f", "infopro-contrast": "1c2f", "predsim": ""}


_OWN_FILES: dict[str, Terms] = {"deinforeg": deinforeg.terms, "lopt": lopt.terms}
_REGISTERED: dict[str, Terms] = {}
_UPSTREAM: dict[str, Upstream] = {}


def register_method(name: str, terms: Terms, upstream: Upstream | None = None) -> None:
    """Make ``method.name = name`` known. Call it on every rank before :func:`pipeline.load_config`.

    ``terms(config.method, task, position)`` gives the terms of a local loss; ``position`` in [0, 1] is where the module
    stands between the first and the last one that has a head. With ``upstream`` every head of a module is told the
    weights of the next module's first block (:meth:`pipeline.models.heads.AuxiliaryHead.receive_weights`).

    Raises:
        ConfigError: the name is taken.
    """
    if name in METHODS:
        raise ConfigError(f"method '{name}' exists already; choose another name")
    METHODS.append(name)
    _REGISTERED[name] = terms
    if upstream is not None:
        _UPSTREAM[name] = upstream


def upstream_of(config: MethodConfig) -> Upstream | None:
    """The weights upstream that the method asks for, if any."""
    return man.declared(config) or _UPSTREAM.get(config.name)


class Level(nn.Module):
    """All heads of one level (independent or cascade) of one module, and their weights.

    Args:
        weight: of the whole level, or its values in the first and the last epoch.
        terms: name -> (weight within the level, head).
        front: what stands before all heads, if anything.
    """

    def __init__(
        self, weight: LevelWeight, terms: dict[str, tuple[float, PatchedHead]], front: man.MomentumFront | None = None
    ) -> None:
        super().__init__()
        self.front = front
        self.terms = nn.ModuleDict({name: head for name, (_, head) in terms.items()})
        self._weight = weight
        self._shares = {name: share for name, (share, _) in terms.items()}
        self.begin_epoch(1, 1)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Use the weight of ``epoch`` (1-based) of ``epochs``."""
        weight = level_weight(self._weight, epoch, epochs)
        self.weights = {name: weight * share for name, share in self._shares.items()}

    def heads(self) -> list[tuple[str, PatchedHead]]:
        """Names and heads in the order in which they run."""
        return [(name, head) for name, head in self.terms.items() if isinstance(head, PatchedHead)]

    @property
    def counts(self) -> bool:
        """Whether any of its losses has a weight."""
        return any(self._shares.values())

    @property
    def asks(self) -> frozenset[str]:
        """What its heads ask for, see :class:`pipeline.models.heads.Given`."""
        return frozenset().union(*(head.asks for _, head in self.heads()))

    def receive_weights(self, weights: Tensors, step: int) -> None:
        """Tell every head the weights of the next module's first block after its update of batch ``step``."""
        if self.front is not None:
            self.front.receive_weights(weights)
        for _, patched in self.heads():
            for head in patched.heads:
                assert isinstance(head, AuxiliaryHead)
                head.receive_weights(weights, step)

    def loss(
        self, feature: Tensor, given: Given, autocast: Autocast = contextlib.nullcontext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the level in one graph, all heads and patches, and the un-weighted loss of every term."""
        total, losses = feature.new_zeros((), dtype=full(feature).dtype), {}
        with autocast():
            feature = self._fronted(feature)
            for name, head in self.heads():
                loss = head.loss(feature, given)
                total, losses[name] = total + self.weights[name] * loss, loss.detach()
        return total, losses

    def backward(
        self,
        feature: Tensor,
        given: Given,
        scale: float,
        autocast: Autocast = contextlib.nullcontext,
    ) -> tuple[Gradient, dict[str, Tensor]]:
        """Run all heads and their backward passes on a detached feature (B, ...).

        Returns:
            ``scale * d(level loss)/d(feature)``, like the feature, and the un-weighted loss of every term.
        """
        if self.front is None:
            return self._backward_of_heads(feature, given, scale, autocast)
        leaf = feature.detach().requires_grad_()
        with torch.enable_grad(), autocast():
            y = self.front(leaf)
        gradient, losses = self._backward_of_heads(y.detach(), given, scale, autocast)
        y.backward(whole(gradient))
        assert leaf.grad is not None
        return leaf.grad, losses

    def _backward_of_heads(
        self, feature: Tensor, given: Given, scale: float, autocast: Autocast
    ) -> tuple[Gradient, dict[str, Tensor]]:
        gradient: Gradient | None = None
        losses = {}
        for name, head in self.heads():
            before = None if gradient is None else whole(gradient)
            weights = [scale * self.weights[name]]
            ((gradient, losses[name]),) = backward_together([head], feature, given, weights, [before], autocast)
        return torch.zeros_like(feature) if gradient is None else gradient, losses

    def _fronted(self, feature: Tensor) -> Tensor:
        return feature if self.front is None else self.front(feature)

    def logits(self, feature: Tensor) -> Tensor | None:
        """Output of the first head that does the task, or None."""
        feature = self._fronted(feature)
        for _, head in self.heads():
            scores = head.logits(feature)
            if scores is not None:
                return scores
        return None


def build_level(
    level: str,
    module: int,
    modules: int,
    shape: FeatureShape,
    task: Task,
    config: Config,
    later: Sequence[LaterBlock] = (),
) -> Level:
    """The ``independent`` or ``cascade`` level of ``module`` (0-based, of ``modules``) on outputs of ``shape``.

    ``later``: all blocks behind the module, where the method is one that :func:`looks_ahead`.

    Heads are initialised from the default RNG; the caller seeds it.

    Raises:
        ConfigError: a head or patch grid that the feature is too small for, or an unknown head.
    """
    released = config.hierarchy.variant == "released"
    weight = config.hierarchy.independent_weight if level == "independent" else config.hierarchy.cascade_weight
    assert weight is not None
    position = lambda_position(modules, module, level, config.hierarchy, config.model.modules)
    front = man.front(config.method, later)
    if front is not None:
        shape, later = front.shape, later[1:]
    _, whole_map, _ = reading_of(shape, task.image_shape, 1, True)
    terms = method_terms(config.method, task, position, later, _stride(whole_map, task))
    if released and level == "independent":  # the released code keeps only the classification term, with weight 1
        terms = [dataclasses.replace(t, weight=1.0) for t in terms if t.name in ("task", "prediction")]
    patches = config.patches
    reconstructs = any(term.name == RECONSTRUCTION for term in terms)
    if patches.grid > 1 and patches.heads == RECONSTRUCTION and not released and not reconstructs:
        raise ConfigError(
            f"patches.heads = '{patches.heads}' with patches.grid = {patches.grid}: method '{config.method.name}' has "
            "no head that reconstructs; use patches.heads=all or patches.grid=1"
        )
    built: dict[str, tuple[float, PatchedHead]] = {}
    for term in terms:
        every = patches.heads == "all" and not released
        n = patches.grid if len(shape) > 1 and (every or term.name == RECONSTRUCTION) else 1
        reading, stands_on, grid = reading_of(shape, task.image_shape, n, term.as_map)
        sides = stands_on[1:] if len(stands_on) == 3 else stands_on[:1]
        if n > 1 and min(sides + task.image_shape[1:]) < n:
            raise ConfigError(
                f"patches.grid = {n}, but module {module} ends in {'x'.join(map(str, sides))} features; "
                f"use at most {min(sides)}"
            )
        if n > 1 and patches.statistics == "shared":
            _refuse_shared(module, reading, stands_on, task, n)
            reading, stands_on, grid = AsRows(n), patch_shape(stands_on, n), 1
        separate = released and grid > 1 and len(stands_on) == 3
        make = partial(_head_of, term, patch_shape(stands_on, grid))
        head = PatchedHead(make, grid, separate, at_once(config, grid), reading)
        initialise(head)
        use_plain(head, TUNED_LAYERS if config.method.reconciliation > 0 else config.precision.plain_layers)
        built[term.name] = (term.weight, head)
    return Level(weight, built, front)


def _refuse_shared(module: int, reading: Reading | None, shape: FeatureShape, task: Task, grid: int) -> None:
    """Patches as rows of a batch: of maps, all of one size."""
    where = f"patches.statistics = 'shared' with patches.grid = {grid}"
    if reading is not None or len(shape) != 3 or len(task.image_shape) != 3:
        raise ConfigError(
            f"{where}: module {module} ends in features {shape} that are no map; use patches.statistics=patch"
        )
    if any(side % grid for side in (*shape[1:], *task.image_shape[1:])):
        raise ConfigError(
            f"{where}: module {module} ends in {'x'.join(map(str, shape[1:]))} features of "
            f"{'x'.join(map(str, task.image_shape[1:]))} images, which make no patches of one size; use a grid that "
            "divides all sides, or patches.statistics=patch"
        )


def at_once(config: Config, grid: int) -> int:
    """Patches that a head works on together; SGR has the loss of all in one graph, one after another."""
    wanted = 1 if config.method.reconciliation > 0 else config.patches.at_once
    return grid * grid if isinstance(wanted, str) else wanted


def _head_of(term: Term, shape: FeatureShape) -> AuxiliaryHead:
    """The head of a term, which a user may have written."""
    head: object = term.make(shape)
    if not isinstance(head, AuxiliaryHead):
        raise ConfigError(
            f"the head of the local loss '{term.name}' is a {type(head).__name__}; give an AuxiliaryHead, such as "
            "TaskHead(network, loss)"
        )
    return head


def levels_of(
    plan: ModulePlan,
    modules: int,
    shape: FeatureShape,
    task: Task,
    config: Config,
    later: Sequence[LaterBlock] = (),
) -> dict[str, Callable[[], Level]]:
    """Builders of the levels that ``plan`` gives a module, by level name; called under a seed of the module's own."""
    names = [name for name, present in (("cascade", plan.cascade), ("independent", plan.independent)) if present]
    return {name: partial(build_level, name, plan.index, modules, shape, task, config, later) for name in names}


def looks_ahead(config: MethodConfig) -> bool:
    """Whether heads are made of copies of blocks behind their module."""
    return config.name == "auglocal" or config.front != "none"


def _stride(shape: FeatureShape, task: Task) -> float:
    """Height of the images over that of a map; 1 where there is no such."""
    return task.image_shape[1] / shape[1] if len(shape) == len(task.image_shape) == 3 else 1.0


def method_terms(
    config: MethodConfig, task: Task, position: float, later: Sequence[LaterBlock] = (), stride: float = 1.0
) -> list[Term]:
    """The terms of the method's local loss; ``position`` in [0, 1] interpolates InfoPro's weights, ``later`` are the
    blocks behind the module, ``stride`` is the height of the images over that of the module's output.

    Raises:
        ConfigError: a head that the method or the task does not have.
    """
    if config.name == "auglocal":
        return auglocal.terms(config, task, position, later)
    elsewhere = _OWN_FILES | _REGISTERED
    if config.name in elsewhere:
        return elsewhere[config.name](config, task, position)
    _refuse_what_the_task_lacks(config, task)
    head = config.head or DEFAULT_HEADS[config.name]
    if config.name == "dgl":
        if head == FCN_HEAD:
            return [Term("task", 1.0, lambda shape: _fcn(shape, task), as_map=True)]
        if head not in DGL_HEADS:
            raise ConfigError(f"method.head = '{head}' is no head of dgl; {suggest(head, DGL_HEADS)}")
        return [
            Term(
                "task",
                1.0,
                lambda shape: task.head(shape, lambda size: heads.dgl_head(size, task.classes, head)),
                as_map=True,
            )
        ]
    if config.name == "predsim":
        if head:
            raise ConfigError(f"method.head = '{head}': predsim has one fixed pair of heads; remove method.head")
        return [
            Term("similarity", config.similarity, lambda shape: _similarity(shape, task.classes), as_map=True),
            Term(
                "prediction",
                1.0 - config.similarity,
                lambda shape: task.head(
                    shape, lambda size: heads.pooled_linear(size, task.classes, config.prediction_inputs)
                ),
                as_map=True,
            ),
        ]
    contrast = config.name == "infopro-contrast"
    out = config.feature_dim if contrast else task.classes

    def network(size: FeatureShape) -> nn.Sequential:
        if head == IMAGENET_HEAD:
            return imagenet_head(size, out)
        return heads.xcyf(size, out, head, config.feature_dim, config.widen)

    def make_task(shape: FeatureShape) -> AuxiliaryHead:
        if head == FCN_HEAD:
            return _fcn(shape, task)
        if not contrast:
            return task.head(shape, network)
        if len(shape) == 1:
            flat = nn.Sequential(VectorInput(), *network((shape[0], 1, 1)))
            return heads.ContrastHead(flat, config.temperature)
        return heads.ContrastHead(network(shape), config.temperature)

    if config.name == "greedy":
        return [Term("task", 1.0, make_task, as_map=True)]
    first, last = config.reconstruction
    task_first, task_last = config.task
    return [
        Term(
            RECONSTRUCTION,
            first + (last - first) * position,
            lambda shape: _decoder(shape, task, config, stride),
            as_map=True,
        ),
        Term("task", task_first + (task_last - task_first) * position, make_task, as_map=True),
    ]


def _refuse_what_the_task_lacks(config: MethodConfig, task: Task) -> None:
    """What a method's heads compare must be there."""
    kind, alternatives = type(task).__name__, "use dgl or greedy, or register a method"
    soft = isinstance(task, Classification) and task.soft
    if config.name == "infopro-contrast" and soft:
        raise ConfigError(
            "method.name = 'infopro-contrast' compares images of one class, and mixup and CutMix leave no image with "
            "one; remove data.mixup and data.cutmix, or use infopro"
        )
    if config.name in ("predsim", "infopro-contrast") and task.target != LABEL and not soft:
        raise ConfigError(
            f"method.name = '{config.name}' compares the classes of whole rows, but the target of {kind} is "
            f"{task.target.shape} per row; {alternatives}"
        )
    if config.name.startswith("infopro") and len(task.image_shape) != 3 and not task.vocabulary:
        raise ConfigError(
            f"method.name = '{config.name}' reconstructs images, or ids of a known number, but an input of {kind} is "
            f"{task.image_shape} and its vocabulary 0; {alternatives}"
        )
    if config.head == FCN_HEAD:
        if len(task.output_shape) != 3:
            raise ConfigError(
                f"method.head = '{FCN_HEAD}' is for an output of every pixel, but that of {kind} is "
                f"{task.output_shape}; remove method.head"
            )
    elif config.head and not isinstance(task, Classification):
        raise ConfigError(
            f"method.head = '{config.head}' is a network that classifies whole rows, {kind} brings its own head; "
            "remove method.head"
        )


def _decoder(shape: FeatureShape, task: Task, config: MethodConfig, stride: float) -> AuxiliaryHead:
    """Reconstructs what the network was given: an image from a map, ids from a sequence."""
    if len(shape) == 3:
        if config.decoder in LAST_WIDTHS:
            return StepwiseDecoderHead(shape[0], task.image_shape[0], stride, LAST_WIDTHS[config.decoder])
        return heads.DecoderHead(shape[0], task.image_shape[0], config.widen)
    if len(shape) == 2 and task.vocabulary:
        return IdsHead(shape[-1], task.vocabulary)
    raise ConfigError(
        "a reconstruction head (infopro) needs a feature map, or tokens on a grid of squares of the image, but a local "
        f"module ends in {shape}; use dgl or greedy there"
    )


def _fcn(shape: FeatureShape, task: Task) -> AuxiliaryHead:
    if len(shape) != 3:
        raise ConfigError(
            f"method.head = '{FCN_HEAD}' needs a feature map, but a local module ends in {shape}; cut elsewhere"
        )
    return FcnHead(shape, task.output_shape, task.loss)


def _similarity(shape: FeatureShape, classes: int) -> AuxiliaryHead:
    if len(shape) == 3:
        return heads.SimilarityHead(shape[0], classes)
    return SequenceSimilarityHead(shape[-1], classes)
