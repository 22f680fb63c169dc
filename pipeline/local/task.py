"""A task says what is asked of a network: what goes in, what comes out, what is wanted, how good that is.

                    Classification              for example: one class per pixel   for example: the next token
    in              images (B, C, H, W)         images (B, C, H, W)                ids (B, T)
    out             logits (B, classes)         logits (B, classes, H, W)          logits (B, T, classes)
    target          classes (B,)                classes (B, H, W)                  ids (B, T)
    head            the method's own network    1x1 convolution, upsampling        linear layer
    metric          error, percent              mean intersection over union       perplexity

Local losses and the loss of the last module are the task's; a method says where heads stand and with which weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.base import metric as forms
from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.base.flow import LABEL, MAIN, Specs, TensorSpec
from pipeline.base.metric import MetricForm
from pipeline.models import losses
from pipeline.models.heads import AuxiliaryHead, FeatureShape, TaskHead, xcyf
from pipeline.models.layers import VectorInput


@dataclass(frozen=True)
class Metric:
    """A number for people, from what is counted batch by batch.

    Attributes:
        name: key in files, such as "error_pct".
        title: for people, such as "error".
        count: (output (B, ...), target (B, ...)) -> statistics of any shape, summed over the test set. Outputs are
            those of the network or of a head.
        value: (sum of the statistics, number of rows) -> the number.
        unit: behind the number, such as "%".
        digits: behind the point.
        better: whether a lower or a higher number is better.
    """

    name: str
    title: str
    count: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor, int], float]
    unit: str = ""
    digits: int = 2
    better: Literal["lower", "higher"] = "lower"

    @property
    def form(self) -> MetricForm:
        """How it reads, without how it is counted."""
        return MetricForm(self.name, self.title, self.unit, self.digits, self.better)

    def of(self, statistics: Tensor, rows: int) -> float:
        """The number; infinity where it is too large for one, as the perplexity of a network that has diverged."""
        try:
            return float(self.value(statistics, rows))
        except OverflowError:
            return math.inf

    def cost(self, value: float | None) -> float | None:
        """The same number so that lower is better; None where it is none that could be compared."""
        if value is None or not math.isfinite(value):
            return None
        return value if self.better == "lower" else -value


@dataclass(frozen=True)
class Task(ABC):
    """What is asked of a network. Subclass it for a task of your own and pass it to :func:`pipeline.train` as ``task``,
    with a network and loaders of your own.

    Attributes:
        classes: what there is to choose from: classes of an image or a pixel, the vocabulary.
        image_shape: of one raw input, without the batch: (C, H, W) of an image, (T,) of a sequence of ids.
    """

    classes: int
    image_shape: tuple[int, ...]

    @property
    def inputs(self) -> Specs:
        """What the network takes, by name; "x" is an image in floating point unless you say otherwise."""
        return {MAIN: TensorSpec(self.image_shape)}

    @property
    def image(self) -> TensorSpec:
        """The raw input, for heads that ask for it: uint8 pixels of an image, else "x" as it is."""
        main = self.inputs[MAIN]
        return TensorSpec(self.image_shape, torch.uint8) if main.dtype.is_floating_point else main

    @property
    def vocabulary(self) -> int:
        """How many ids there are where "x" is of ids, for heads that reconstruct it; 0: not known, or no ids."""
        return 0

    @property
    @abstractmethod
    def target(self) -> TensorSpec:
        """What is wanted of each row."""

    @property
    @abstractmethod
    def output_shape(self) -> tuple[int, ...]:
        """What a network must end in, without the batch."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The first one is shown everywhere and chooses the best checkpoint."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar, the mean over the batch, in full precision whatever the dtype of the output (B, ...)."""

    @abstractmethod
    def head(self, shape: FeatureShape, pooled: Callable[[FeatureShape], nn.Sequential] | None = None) -> AuxiliaryHead:
        """A head that does the task on features of ``shape``; its logits have the form of the network's output.

        Args:
            shape: (C, H, W), (T, D) or (D,), of a feature or of its largest patch.
            pooled: builds the method's own network for a map (C, H, W), which pools it and ends in ``classes`` values;
                a task whose output is more than that brings a network of its own. Without it: the plainest head.

        Raises:
            ConfigError: there is none for such features.
        """

    def total_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of a test batch, summed over its rows: a scalar of float64, on their device."""
        return self.loss(output, target).double() * len(target)


@dataclass(frozen=True)
class Classification(Task):
    """One class per image: (B, classes) logits against int64 (B,) classes, by cross-entropy.

    Attributes:
        label_smoothing: share of the target that is spread evenly over all classes, in every local loss and the last
            one; tests count without it.
        soft: the target is float32 (B, classes), shares of the classes that add up to 1, as mixup and CutMix make them.
    """

    label_smoothing: float = 0.0
    soft: bool = False

    @property
    def target(self) -> TensorSpec:
        return TensorSpec((self.classes,)) if self.soft else LABEL

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.classes,)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (ERROR, TOP5_ERROR) if self.classes >= _CLASSES_WITH_TOP5 else (ERROR,)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return losses.cross_entropy(output, target, self.label_smoothing)

    def total_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target, reduction="sum").double()

    def head(self, shape: FeatureShape, pooled: Callable[[FeatureShape], nn.Sequential] | None = None) -> AuxiliaryHead:
        # The plain loss has a form of its own for patches at once.
        loss = self.loss if self.label_smoothing else losses.cross_entropy
        build = pooled or (lambda size: xcyf(size, self.classes, "0c1f", 0, 1))
        if len(shape) < 3:  # a vector, or a sequence of tokens, of which the mean counts
            return TaskHead(nn.Sequential(VectorInput(), *build((shape[-1], 1, 1))), loss)
        return TaskHead(build(shape), loss)


def classification(config: Config, classes: int, image_shape: tuple[int, ...]) -> Classification:
    """The classification of a data set by name, as the configuration wants its targets."""
    soft = config.data.mixup > 0 or config.data.cutmix > 0
    return Classification(classes, image_shape, config.train.label_smoothing, soft)


def _classes(target: Tensor) -> Tensor:
    """int64 (B,), the class with the largest share where the target is soft."""
    return target.argmax(dim=1) if target.dim() > 1 else target


def _wrong(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(dim=1) != _classes(target)).sum()


def _not_among_five(output: Tensor, target: Tensor) -> Tensor:
    return (output.topk(5, dim=1).indices != _classes(target)[:, None]).all(dim=1).sum()


ERROR = Metric(
    forms.ERROR.name, forms.ERROR.title, _wrong, lambda wrong, rows: 100.0 * int(wrong) / rows, forms.ERROR.unit
)
"""Share of the rows that get the wrong class, in percent."""
TOP5_ERROR = Metric(
    "top5_error_pct", "top-5 error", _not_among_five, lambda wrong, rows: 100.0 * int(wrong) / rows, "%"
)
"""Share of the rows whose class is not among the five with the highest scores, in percent."""
_CLASSES_WITH_TOP5 = 100  # with fewer it says little, and nobody reports it


def task_name(task: Task | None) -> str:
    """What a checkpoint calls a task; without one it is classification."""
    return Classification.__name__ if task is None else type(task).__name__


def refuse_unusable(task: Task) -> None:
    """What would else show after the data have been read, or after an epoch. Loss and metrics are tried on two rows of
    zeros.

    Raises:
        ConfigError: it is no task; it has no classes, no shape or no metrics; two metrics have one name; the loss or
            the counting of a metric fails, or the loss is no scalar.
    """
    given: object = task
    if not isinstance(given, Task):
        what = given.__name__ if isinstance(given, type) else type(given).__name__
        raise ConfigError(f"the task is {what}; pass an instance of a subclass of pipeline.Task: Mine(classes, shape)")
    name, metrics = task_name(task), task.metrics
    if task.classes < 1 or not task.image_shape or any(size < 1 for size in task.image_shape):
        raise ConfigError(
            f"task {name} has classes = {task.classes} and image_shape = {tuple(task.image_shape)}; give one class or "
            "more, and the shape of one input, such as (3, 32, 32)"
        )
    if not metrics:
        raise ConfigError(f"task {name} has no metrics; give at least one, the first chooses the best checkpoint")
    for metric in metrics:
        if [other.name for other in metrics].count(metric.name) > 1:
            raise ConfigError(f"task {name} has two metrics named '{metric.name}'; give each a name of its own")
        if metric.better not in ("lower", "higher"):
            raise ConfigError(f"task {name}: '{metric.name}' is better = '{metric.better}'; say lower or higher")
        _tried(f"task {name}: counting the metric '{metric.name}'", metric.count, task)
    loss: object = _tried(f"task {name}: the loss", task.loss, task)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(f"task {name}: the loss is {what}; give a scalar tensor, the mean over the batch")


def _tried(what: str, function: Callable[[Tensor, Tensor], Tensor], task: Task) -> Tensor:
    """What a user's function gives for two rows of zeros, which every output and every target may be."""
    output, target = torch.zeros(2, *task.output_shape), torch.zeros(2, *task.target.shape, dtype=task.target.dtype)
    try:
        with torch.no_grad():
            return function(output, target)
    except Exception as error:
        shapes = f"an output of shape {tuple(output.shape)} and a target of shape {tuple(target.shape)}"
        raise ConfigError(f"{what} fails on {shapes}: {type(error).__name__}: {error}; mend it") from error
