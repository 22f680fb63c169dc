"""The configuration: frozen dataclasses, one per section; meaning, range and choices of a key stand beside its field.

Every key is ``section.name``. Recipes and ``--set key=value`` fill it (:mod:`pipeline.base.recipes`), and
:func:`pipeline.base.validation.validate` checks it. Nothing here starts any work.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import typing
from dataclasses import dataclass, field

from pipeline.base.cut_tables import group_sizes, modules_of_cut
from pipeline.base.data_config import DataConfig
from pipeline.base.keys import Setting, key

CUTS = ("auto", "cost", "memory", "even", "equal", "hpff", "balanced", "balanced-stl10")
METHODS = ["auglocal", "deinforeg", "dgl", "greedy", "infopro", "infopro-contrast", "lopt", "predsim"]
"""Of ``method.name``; register_method adds to it."""
DGL_HEADS = ("mlp-sr", "mlp", "cnn", "auglocal")
XCYF = re.compile(r"([012])c([123])f")  # heads of InfoPro: X convolutions, Y linear layers
IMAGENET_HEAD = "imagenet"  # of InfoPro and HPFF there
FCN_HEAD = "fcn"  # of a task with an output for every pixel, with any method that has such a head
DECODERS = ("cifar", "imagenet", "imagenet-hpff")
TUNED_LAYERS = ("batch-norm", "pointwise", "paired", "pooling", "upsampling")  # of heads, see models.tuned
LOGGERS = ("tensorboard", "wandb")
LevelWeight = float | tuple[float, ...]
"""A number, or its values in the first and the last epoch."""
YEAR_MIN = 366 * 24 * 60
MONTH_S = 31 * 24 * 3600
LARGEST_SEED = 2**63 - 1  # the largest integer of TOML


@dataclass(frozen=True)
class ModelConfig:
    """What is trained and where it is cut."""

    name: str = key(
        "resnet32",
        'backbone, one of ours, of torchvision, a registered one, "timm/<name>", "decoder/LAYERSxWIDTHxHEADS"',
    )
    modules: int = key(4, "K, the number of local modules; 1 is plain backpropagation", at_least=1, at_most=10_000)
    cuts: str | tuple[str, ...] = key(
        "auto",
        "the papers' cut points, even, the blocks that local modules begin with, cost: fewest FLOPs of the largest "
        "module, heads included, or memory: fewest bytes; auto: the table if it has K",
        choices=CUTS,
    )
    stem: str = key(
        "auto",
        "merged into the first module, its own module, or auto: as the cut table says",
        choices=("auto", "merged", "own"),
    )
    weights: str = key(
        "",
        "file to begin with, a state dict of the un-cut network (torchvision's or timm's names, .pth or .safetensors), "
        "for a DeepLabV3 also one of its ResNet; empty = weights drawn from the seed",
    )
    aux_weight: float = key(
        0.4, 'weight of the last loss on what the network gives as "aux" in training, as DeepLabV3 does',
        at_least=0, at_most=10**6,
    )
    group: int | tuple[int, ...] = key(
        1,
        "w: so many consecutive local modules of the cut are joined to one, or a list of how many each one is made of",
        at_least=1, at_most=10_000,
    )


@dataclass(frozen=True)
class MethodConfig:
    """Which auxiliary heads and losses a module gets."""

    name: str = key("infopro", "the local loss", choices=METHODS)
    head: str = key(
        "",
        "dgl: mlp-sr, mlp, cnn or auglocal; infopro: 0c1f to 2c3f, or imagenet; one class per pixel: fcn; empty = the "
        "method's default",
    )
    decoder: str = key(
        "cifar",
        "of InfoPro's reconstruction: cifar = at once to the size of the image; imagenet = in steps, for large images; "
        "imagenet-hpff = with HPFF's width",
        choices=DECODERS,
    )
    feature_dim: int = key(
        128, "width of hidden linear layers in XcYf heads and of deinforeg's projector", at_least=1, at_most=2**20
    )
    widen: int = key(1, "width multiplier of InfoPro's heads", at_least=1, at_most=1024)
    reconstruction: tuple[float, ...] = key(
        (5.0, 0.5), "InfoPro: lambda_1 at the first and the last local head", at_least=0, at_most=10**6, length=2
    )
    task: tuple[float, ...] = key(
        (0.5, 1.0), "InfoPro: lambda_2 at the first and the last local head", at_least=0, at_most=10**6, length=2
    )
    temperature: float = key(0.07, "of the supervised contrast loss", above=0, at_most=10**6)
    similarity: float = key(
        0.99, "PredSim: weight of similarity matching; the prediction gets the rest", at_least=0, at_most=1
    )
    prediction_inputs: int = key(
        512, "PredSim: features left after pooling, before the linear layer", at_least=1, at_most=2**20
    )
    reconciliation: float = key(
        0.0,
        "SGR, lambda: weight of the squared distance between the gradient that a module's loss has in its input and "
        "the one that the loss of the module before has there; 0 = none",
        at_least=0, at_most=10**9,
    )
    front: str = key(
        "none",
        "what stands before the heads: none; man = copies of the next module's first block, one learned and one its "
        "moving average; man++ = with a learned balance of the two",
        choices=("none", "man", "man++"),
    )
    average: float = key(
        0.995, "MAN: share of the moving average that a step keeps", at_least=0, at_most=1
    )
    average_every: int = key(
        1, "MAN, n: steps from one copy of the next block's weights upstream to the next", at_least=1, at_most=10**6
    )
    average_lag: int = key(
        2, "MAN: steps from an update to its use; with 2 or more nobody waits for who keeps up",
        at_least=1, at_most=1024,
    )
    depth: int = key(
        3, "AugLocal, d: copies of later blocks in the first head; later heads have fewer", at_least=1, at_most=10_000
    )


@dataclass(frozen=True)
class HierarchyConfig:
    """HPFF's two levels."""

    cascade_span: int = key(
        1, "k: a cascade's gradient reaches k modules; 1 = plain local learning, K = end to end",
        at_least=1, at_most=10_000,
    )
    variant: str = key(
        "paper",
        "released: the semantics of the released HPFF code, which differs; deepsup: DeepSup-BP, one head on every "
        "module but the last, and every loss flows through the whole network",
        choices=("paper", "released", "deepsup"),
    )
    independent_weight: LevelWeight | None = key(
        None,
        "level weight; two numbers: linear from the first to the last epoch; default 1, 0.001 in the released "
        "variant, 0 in deepsup; 0 = no heads",
        at_least=0, at_most=10**6, length=2,
    )
    cascade_weight: LevelWeight | None = key(
        None,
        "level weight; two numbers: linear from the first to the last epoch; default 1, or 0.999 in the released "
        "variant; 0 = no heads",
        at_least=0, at_most=10**6, length=2,
    )
    levels: str = key(
        "separate",
        "separate: the cascade level first, others wait for it; together: both in fewer, larger operations; auto: "
        "together on ranks where that makes no step longer, so the bits may depend on the placement",
        choices=("separate", "together", "auto"),
    )
    final_loss: str = key(
        "auto",
        "the last module's loss: local, cascade (reaches k modules), auto: cascade at k = K",
        choices=("auto", "local", "cascade"),
    )


@dataclass(frozen=True)
class PatchesConfig:
    """HPFF's patch feature fusion."""

    grid: int = key(
        1, "n: every auxiliary head runs on n x n patches; 1 = whole feature", at_least=1, at_most=1024
    )
    at_once: int | str = key(
        "auto",
        "patches that a head works on together: 1 = one after another, least memory; more = fewer, larger operations; "
        "auto: as many as memory allows",
        choices=("auto",), at_least=1, at_most=2**20,
    )
    heads: str = key(
        "all",
        "which heads: all, or only those that reconstruct, where others see the whole map; released: always those",
        choices=("all", "reconstruction"),
    )
    statistics: str = key(
        "patch",
        "of BatchNorm in heads: of every patch by itself, or shared by the patches of a map, as rows of one batch",
        choices=("patch", "shared"),
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """The order in which a stage works."""

    kind: str = key(
        "exact",
        "exact: bitwise the single-process result; async: cascade gradients late; free: no waiting",
        choices=("exact", "async", "free"),
    )
    micro_batches: int = key(
        1, "M: parts a batch is cut into; BatchNorm then sees the smaller parts", at_least=1, at_most=65_536
    )
    delay: int = key(
        1, "async, d: steps between sending a cascade gradient and using it; 0 = exact", at_least=0, at_most=1024
    )
    ring: int = key(4, "free: batches that a stage keeps to train on again", at_least=1, at_most=1024)
    max_uses: int = key(
        0,
        "free: most steps on one batch, then the stage waits for a new one; 0 = no limit",
        at_least=0, at_most=10**9,
    )


@dataclass(frozen=True)
class PartitionConfig:
    """Which rank owns which modules. `exact` and `async` give one result for all, unless hierarchy.levels=auto."""

    kind: str = key(
        "auto",
        "auto: fewest FLOPs of the busiest rank, heads included, counted; count: equal numbers; measured: smallest "
        "time of the slowest rank; given: as in stages",
        choices=("auto", "count", "measured", "given"),
    )
    stages: tuple[int, ...] = key((), "given: number of local modules of every rank", at_least=1, at_most=10_000)
    warmup: int = key(1, "measured: steps of every module before those that count", at_least=0, at_most=10_000)
    steps: int = key(3, "measured: steps of every module that count", at_least=1, at_most=10_000)


@dataclass(frozen=True)
class ParallelConfig:
    """Pipelines side by side: processes = replicas x stages. Gradients are averaged over the replicas of a stage."""

    replicas: int | str = key(
        1,
        "R, the number of pipelines, each on an equal part of every batch; auto: as many as parallel.stages allows, on "
        "parts as equal as can be",
        choices=("auto",), at_least=1, at_most=65_536,
    )
    stages: int = key(0, "P, the processes of one pipeline; 0 = processes / R", at_least=0, at_most=10_000)
    sync_batch_norm: bool = key(
        False, "statistics of BatchNorm over the batch of all replicas (torch.nn.SyncBatchNorm); needs GPUs"
    )


@dataclass(frozen=True)
class OptimConfig:
    """One optimiser per local module."""

    name: str = key(
        "sgd",
        "SGD with (Nesterov) momentum, AdamW, or Muon for hidden matrices with AdamW for all else",
        choices=("sgd", "adamw", "muon"),
    )
    lr: float = key(0.1, "peak learning rate", above=0, at_most=10**6)
    momentum: float = key(0.9, "of sgd and muon", at_least=0, at_most=1)
    nesterov: bool = key(True, "Nesterov's form of the momentum")
    weight_decay: float = key(1e-4, "of every parameter, heads included", at_least=0, at_most=10**6)
    schedule: str = key(
        "cosine",
        "cosine to 0; cosine-peak: an epoch later, from the peak; step: x 0.1 at 1/2 and 3/4 of the epochs; constant; "
        "poly: (1 - step / steps) ** 0.9 to min_lr, in every step",
        choices=("cosine", "cosine-peak", "step", "constant", "poly"),
    )
    min_lr: float = key(1e-4, "poly: learning rate that it falls to", at_least=0, at_most=10**6)
    warmup_epochs: int = key(10, "epochs of linear warm-up from warmup_lr", at_least=0, at_most=10**6)
    warmup_lr: float = key(0.01, "learning rate of the first epoch of a warm-up", at_least=0, at_most=10**6)
    head_lr: float = key(1.0, "learning rate of auxiliary heads, to that of their module", above=0, at_most=10**6)
    clip_norm: float = key(
        0.0, "largest gradient norm of one local module with its heads; 0 = no clipping", at_least=0, at_most=10**9
    )
    error_feedback: bool = key(False, "async: an update that comes late also makes up for those still under way")


@dataclass(frozen=True)
class TrainConfig:
    """How long, and from which seed."""

    epochs: int = key(10, "passes over the training set", at_least=1, at_most=10**6)
    max_steps: int = key(0, "stop after this many steps, then evaluate; 0 = all epochs", at_least=0, at_most=10**12)
    seed: int = key(0, "of weights, order of the images and augmentation", at_least=0, at_most=LARGEST_SEED)
    label_smoothing: float = key(
        0.0, "share of the target that is spread over all classes, in every loss that classifies whole images",
        at_least=0, at_most=1,
    )
    evaluate_every: int = key(
        1, "epochs between tests; the last epoch is always tested", at_least=1, at_most=10**6
    )
    accumulate: int = key(
        1, "n: batches whose mean gradient makes one update; an epoch ends with the rest", at_least=1, at_most=65_536
    )
    ema: float = key(
        0.0,
        "share of the moving average of all weights that an update keeps; tested and exported beside them; 0 = none",
        at_least=0, at_most=1,
    )
    nonfinite: str = key(
        "stop",
        "a module whose loss or gradient is NaN or infinite: stop the run, or skip its update",
        choices=("stop", "skip"),
    )


@dataclass(frozen=True)
class PrecisionConfig:
    """Arithmetic."""

    compute: str = key(
        "auto",
        "bf16 is autocast; auto: bf16 where the device has bf16 units, else fp32",
        choices=("auto", "fp32", "bf16", "fp64"),
    )
    channels_last: str = key("auto", "memory layout NHWC", choices=("auto", "on", "off"))
    compile: bool = key(False, "torch.compile the heads, and modules that send no gradient; rounds differently")
    cuda_graphs: bool = key(False, "on a GPU: one CUDA graph for each action of a module, captured after a warm-up")
    layers: str | tuple[str, ...] = key(
        "tuned",
        "layers of heads, which round differently: tuned = in forms that are faster on a CPU; plain = PyTorch's own; "
        "or which are tuned",
        choices=("tuned", "plain"), entries=TUNED_LAYERS,
    )

    @property
    def plain_layers(self) -> frozenset[str]:
        """Those of TUNED_LAYERS that are PyTorch's own."""
        tuned = {"tuned": TUNED_LAYERS, "plain": ()}[self.layers] if isinstance(self.layers, str) else self.layers
        return frozenset(TUNED_LAYERS) - frozenset(tuned)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved. All three at 0: only when a run is stopped. Never changes the result."""

    every_epochs: int = key(
        1, "save after the test of every so many epochs, and at the end; 0 = not by epochs", at_least=0, at_most=10**6
    )
    every_steps: int = key(0, "save after every so many steps; 0 = not by steps", at_least=0, at_most=10**12)
    every_minutes: float = key(
        0.0,
        "save after the first step that ends so many minutes after the last save; 0 = not by time",
        at_least=0, at_most=YEAR_MIN,
    )
    keep: int = key(2, "newest checkpoints that stay", at_least=1, at_most=10**6)
    keep_best: bool = key(True, "the one with the best test (error, or the first metric of your task) stays as well")


@dataclass(frozen=True)
class LogConfig:
    """What is made of metrics.jsonl. These keys never change the result."""

    to: tuple[str, ...] = key(
        (), "where every record goes besides: event files of TensorBoard, a run of Weights & Biases", entries=LOGGERS
    )
    curve: bool = key(True, "draw curve.png at the end, which needs matplotlib: loss and test of every module")


@dataclass(frozen=True)
class RuntimeConfig:
    """Processes and waits. These keys never change the result."""

    device: str = key(
        "auto",
        "auto: one GPU per rank where there are enough, else CPU; cuda-shared: ranks share GPUs",
        choices=("auto", "cpu", "cuda", "cuda-shared"),
    )
    threads: int = key(0, "CPU threads per process; 0 = cores / processes", at_least=0, at_most=4096)
    deadline_s: float = key(
        300.0, "longest wait for a peer that is stopped, hung or gone, in seconds", above=0, at_most=MONTH_S
    )
    setup_deadline_s: float = key(
        1800.0,
        "longest time at one thing before the first step (download, decode, verify), in seconds",
        above=0, at_most=MONTH_S,
    )
    queue_depth: int = key(2, "messages posted ahead on every edge", at_least=1, at_most=256)


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    hierarchy: HierarchyConfig = field(default_factory=HierarchyConfig)
    patches: PatchesConfig = field(default_factory=PatchesConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def local_modules(self) -> int:
        """The number of local modules: of the cut, joined in groups."""
        model = self.model
        return len(group_sizes(modules_of_cut(model.name, model.modules, model.cuts), model.group))

    def fingerprint(self) -> str:
        """SHA-256 over every key that can change the result (all but ``partition``, ``checkpoint``, ``log`` and
        ``runtime``)."""
        values = dataclasses.asdict(self)
        for section in ("partition", "checkpoint", "log", "runtime"):
            del values[section]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@functools.cache
def sections() -> dict[str, type]:
    """Section name -> its dataclass, in the order of :class:`Config`."""
    hints = typing.get_type_hints(Config)
    return {section.name: hints[section.name] for section in dataclasses.fields(Config)}


@functools.cache
def settings() -> dict[str, Setting]:
    """``section.name`` -> what is known about every key, in order."""
    return {
        f"{section}.{entry.name}": Setting(
            f"{section}.{entry.name}", typing.get_type_hints(kind)[entry.name], entry.default, entry.metadata["bounds"]
        )
        for section, kind in sections().items()
        for entry in dataclasses.fields(kind)
    }
