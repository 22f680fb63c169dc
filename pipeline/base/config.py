"""The configuration: frozen dataclasses, filled from a TOML recipe and ``--set key=value``, validated, hashed.

Every key is ``section.name``; the comment behind a field is its documentation. Unknown names are errors with the
nearest valid name. Nothing here starts any work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError, suggest

RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT_RECIPE = "digits-resnet32-k4-infopro-hpff"
CUTS = ("auto", "even", "equal", "hpff", "balanced", "balanced-stl10")
METHODS = ["dgl", "greedy", "infopro", "infopro-contrast", "predsim"]  # register_method adds to it
ALIASES = {
    "method.name": {"infopro-softmax": "infopro"},
    "precision.compute": {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16"},
}


@dataclass(frozen=True)
class ModelConfig:
    """What is trained and where it is cut."""

    name: str = "resnet32"  # backbone
    modules: int = 4  # K, the number of local modules; 1 is plain backpropagation
    cuts: str = "auto"  # named cut points of the papers, or "even"; "auto" = the table where it has this K, else even
    stem: str = "auto"  # "merged" into the first module, its "own" module, or "auto": as the cut table says


@dataclass(frozen=True)
class MethodConfig:
    """Which auxiliary heads and losses a module gets."""

    name: str = "infopro"  # dgl | greedy | infopro | infopro-contrast | predsim
    head: str = ""  # dgl: mlp-sr | mlp | cnn | auglocal; infopro: XcYf; empty = the method's default
    feature_dim: int = 128  # width of hidden linear layers in XcYf heads
    widen: int = 1  # width multiplier of InfoPro's heads
    reconstruction: tuple[float, ...] = (5.0, 0.5)  # InfoPro lambda_1 at the first and the last local head
    task: tuple[float, ...] = (0.5, 1.0)  # InfoPro lambda_2 at the first and the last local head
    temperature: float = 0.07  # of the supervised contrast loss
    similarity: float = 0.99  # PredSim: weight of similarity matching; the prediction gets the rest
    prediction_inputs: int = 512  # PredSim: features left after pooling, before the linear layer


@dataclass(frozen=True)
class HierarchyConfig:
    """HPFF's two levels."""

    cascade_span: int = 1  # k: a cascade's gradient reaches k modules; 1 = plain local learning, K = end to end
    variant: str = "paper"  # "paper", or "released": the semantics of the released HPFF code
    independent_weight: float | None = None  # level weight; default 1, or 0.001 in the released variant; 0 = no heads
    cascade_weight: float | None = None  # level weight; default 1, or 0.999 in the released variant; 0 = no heads
    final_loss: str = "auto"  # the last module's loss: "local", "cascade" (reaches k modules), "auto": cascade at k = K


@dataclass(frozen=True)
class PatchesConfig:
    """HPFF's patch feature fusion."""

    grid: int = 1  # n: every auxiliary head runs on n x n patches; 1 = whole feature


@dataclass(frozen=True)
class ScheduleConfig:
    """The order in which a stage works."""

    kind: str = "exact"  # exact: bitwise the single-process result | async: cascade gradients late | free: no waiting
    micro_batches: int = 1  # M: parts a batch is cut into; BatchNorm then sees the smaller parts
    delay: int = 1  # async, d: steps between sending a cascade gradient and using it; 0 = exact
    ring: int = 4  # free: batches that a stage keeps to train on again
    max_uses: int = 0  # free: most steps on one batch, then the stage waits for a new one; 0 = no limit


@dataclass(frozen=True)
class PartitionConfig:
    """Which rank owns which local modules. These keys never change the result of `exact` and `async`."""

    kind: str = "count"  # count: equal numbers | measured: smallest time of the slowest rank | given: as in stages
    stages: tuple[int, ...] = ()  # given: number of local modules of every rank
    warmup: int = 1  # measured: steps of every module before those that count
    steps: int = 3  # measured: steps of every module that count


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    name: str = "digits"  # digits | cifar10 | cifar100 | svhn | stl10 | folder
    root: str = ""  # directory of the data set; for "folder" a directory or a tar file
    download: bool = False  # let torchvision fetch a missing data set
    batch_size: int = 64  # images per step, over all micro-batches
    image_size: int = 0  # "folder": resize and crop to this many pixels; 0 = images have one size already
    augment: str = "auto"  # "auto": the recipe of the data set, or "none"
    drop_last: bool = False  # leave the short last batch of an epoch out
    cache_gib: float = 4.0  # keep decoded images in memory up to this size


@dataclass(frozen=True)
class OptimConfig:
    """One optimiser per local module."""

    name: str = "sgd"  # sgd (momentum, Nesterov) | adamw
    lr: float = 0.1  # peak learning rate
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    schedule: str = "cosine"  # cosine | step (x 0.1 at 1/2 and 3/4 of the epochs) | constant
    warmup_epochs: int = 10  # linear warm-up from warmup_lr
    warmup_lr: float = 0.01
    clip_norm: float = 0.0  # largest gradient norm of one local module with its heads; 0 = no clipping


@dataclass(frozen=True)
class TrainConfig:
    """How long, and from which seed."""

    epochs: int = 10
    max_steps: int = 0  # stop after this many steps, then evaluate; 0 = all epochs
    seed: int = 0
    evaluate_every: int = 1  # epochs between tests; the last epoch is always tested
    nonfinite: str = "stop"  # a module whose loss or gradient is NaN or infinite: stop the run | skip its update


@dataclass(frozen=True)
class PrecisionConfig:
    """Arithmetic."""

    compute: str = "auto"  # fp32 | bf16 (autocast) | fp64 | auto: bf16 where the device has bf16 units, else fp32
    channels_last: str = "auto"  # memory layout NHWC: on | off | auto
    compile: bool = False  # torch.compile the heads, and modules that send no gradient; rounds differently


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved. All three at 0: only when a run is stopped. Never changes the result."""

    every_epochs: int = 1  # after the test of every so many epochs, and at the end; 0 = not by epochs
    every_steps: int = 0  # after every so many steps; 0 = not by steps
    every_minutes: float = 0.0  # after the first step that ends so many minutes after the last save; 0 = not by time
    keep: int = 2  # newest checkpoints that stay
    keep_best: bool = True  # the one with the smallest test error stays as well


@dataclass(frozen=True)
class RuntimeConfig:
    """Processes and waits. These keys never change the result."""

    device: str = "auto"  # auto: one GPU per rank where there are enough, else CPU; cpu | cuda | cuda-shared
    threads: int = 0  # CPU threads per process; 0 = cores / processes
    deadline_s: float = 300.0  # longest wait for a peer that is stopped, hung or gone, in seconds
    setup_deadline_s: float = 1800.0  # longest time at one thing before the first step: download, decode, verify
    queue_depth: int = 2  # messages posted ahead on every edge


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    hierarchy: HierarchyConfig = field(default_factory=HierarchyConfig)
    patches: PatchesConfig = field(default_factory=PatchesConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def fingerprint(self) -> str:
        """SHA-256 over every key that can change the result (all but ``partition``, ``checkpoint`` and ``runtime``)."""
        values = dataclasses.asdict(self)
        del values["partition"], values["checkpoint"], values["runtime"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_config(
    recipe: str | None = None, file: Path | None = None, assignments: Iterable[str] = ()
) -> Config:
    """Recipe, then file, then ``key=value`` assignments; later ones win. The result is resolved and validated.

    Raises:
        ConfigError: unknown recipe, key or name; a value of the wrong type or out of range.
    """
    if recipe is None and file is None:
        recipe = DEFAULT_RECIPE
    values: dict[str, Any] = {}
    if recipe is not None:
        path = RECIPES / f"{recipe}.toml"
        if not path.is_file():
            raise ConfigError(f"--recipe {recipe}: no such recipe; {suggest(recipe, recipe_names())}")
        _merge(values, _read_toml(path))
    if file is not None:
        _merge(values, _read_toml(file))
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or "." not in key:
            raise ConfigError(f"--set {assignment}: write section.key=value, for example --set train.epochs=5")
        section, _, name = key.strip().partition(".")
        _merge(values, {section: {name: _parse(text.strip())}})
    return validate(from_dict(values))


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """Build a :class:`Config` from nested dictionaries, checking names and types."""
    sections = {f.name: f for f in dataclasses.fields(Config)}
    built: dict[str, Any] = {}
    for section, entries in values.items():
        if section not in sections:
            raise ConfigError(f"unknown section '{section}' in the configuration; {suggest(section, sections)}")
        kind = typing.cast(Any, sections[section].default_factory)
        if not isinstance(entries, Mapping):
            raise ConfigError(f"'{section}' is a section, not a value; write {section}.key = value")
        hints = typing.get_type_hints(kind)
        checked = {}
        for name, value in entries.items():
            key = f"{section}.{name}"
            if name not in hints:
                every = [f"{s}.{n}" for s, f in sections.items() for n in typing.get_type_hints(f.default_factory)]
                raise ConfigError(f"unknown key '{key}'; {suggest(key, every)}")
            checked[name] = _convert(key, value, hints[name])
        built[section] = kind(**checked)
    return Config(**built)


def to_toml(config: Config) -> str:
    """The configuration as TOML text that :func:`load_config` reads back."""
    lines: list[str] = []
    for section, entries in dataclasses.asdict(config).items():
        lines.append(f"[{section}]")
        for name, value in entries.items():
            if value is not None:
                lines.append(f"{name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}")
        lines.append("")
    return "\n".join(lines)


def validate(config: Config) -> Config:
    """Check every value that can be checked without data or model, and fill in variant-dependent defaults.

    Raises:
        ConfigError: names the first value that cannot work, its key and the fix.
    """
    hierarchy = config.hierarchy
    released = hierarchy.variant == "released"
    config = dataclasses.replace(
        config,
        hierarchy=dataclasses.replace(
            hierarchy,
            independent_weight=_default(hierarchy.independent_weight, 0.001 if released else 1.0),
            cascade_weight=_default(hierarchy.cascade_weight, 0.999 if released else 1.0),
        ),
    )
    choices = {
        "model.cuts": CUTS,
        "model.stem": ("auto", "merged", "own"),
        "method.name": METHODS,
        "hierarchy.variant": ("paper", "released"),
        "hierarchy.final_loss": ("auto", "local", "cascade"),
        "schedule.kind": ("exact", "async", "free"),
        "partition.kind": ("count", "measured", "given"),
        "optim.name": ("sgd", "adamw"),
        "optim.schedule": ("cosine", "step", "constant"),
        "train.nonfinite": ("stop", "skip"),
        "precision.compute": ("auto", "fp32", "bf16", "fp64"),
        "precision.channels_last": ("auto", "on", "off"),
        "runtime.device": ("auto", "cpu", "cuda", "cuda-shared"),
    }
    for key, valid in choices.items():
        value = _get(config, key)
        if value not in valid:
            raise ConfigError(f"{key} = '{value}' is not known; {suggest(value, valid)}")
    at_least_one = (
        "model.modules hierarchy.cascade_span patches.grid schedule.micro_batches data.batch_size train.epochs "
        "train.evaluate_every method.feature_dim method.widen method.prediction_inputs runtime.queue_depth "
        "schedule.ring partition.steps checkpoint.keep"
    )
    for key in at_least_one.split():
        if _get(config, key) < 1:
            raise ConfigError(f"{key} = {_get(config, key)} must be at least 1")
    not_negative = (
        "hierarchy.independent_weight hierarchy.cascade_weight optim.weight_decay optim.clip_norm optim.momentum "
        "optim.warmup_epochs optim.warmup_lr train.max_steps train.seed runtime.threads data.image_size data.cache_gib "
        "schedule.delay schedule.max_uses partition.warmup checkpoint.every_epochs checkpoint.every_steps "
        "checkpoint.every_minutes"
    )
    for key in not_negative.split():
        if not _get(config, key) >= 0:  # NaN is no number at all
            raise ConfigError(f"{key} = {_get(config, key)} must not be negative")
    for key in ("optim.lr", "runtime.deadline_s", "runtime.setup_deadline_s", "method.temperature"):
        if _get(config, key) <= 0:
            raise ConfigError(f"{key} = {_get(config, key)} must be greater than 0")
    for key in ("method.reconstruction", "method.task"):
        pair = _get(config, key)
        if len(pair) != 2 or min(pair) < 0:
            raise ConfigError(f"{key} = {list(pair)} must be two weights >= 0: [at the first head, at the last head]")
    if not 0 <= config.method.similarity <= 1:
        raise ConfigError(f"method.similarity = {config.method.similarity} must lie between 0 and 1")
    batch, parts = config.data.batch_size, config.schedule.micro_batches
    if batch % parts:
        raise ConfigError(
            f"data.batch_size = {batch} is not divisible by schedule.micro_batches = {parts}; "
            f"use a multiple of {parts}, for example {batch + parts - batch % parts}"
        )
    if parts > 1 and batch // parts < 2:
        raise ConfigError(
            f"data.batch_size = {batch} with schedule.micro_batches = {parts} leaves BatchNorm one image; use fewer "
            "micro-batches or a larger batch"
        )
    for key, kind in (("delay", "async"), ("ring", "free"), ("max_uses", "free")):
        value = getattr(config.schedule, key)
        if config.schedule.kind != kind and value != getattr(ScheduleConfig(), key):
            raise ConfigError(
                f"schedule.{key} = {value} with schedule.kind = '{config.schedule.kind}': it belongs to '{kind}'; "
                f"remove it or use schedule.kind={kind}"
            )
    if config.model.modules > 1 and config.hierarchy.cascade_span > config.model.modules:
        raise ConfigError(
            f"hierarchy.cascade_span = {config.hierarchy.cascade_span} is larger than model.modules = "
            f"{config.model.modules}; the largest span is K, which is end-to-end flow"
        )
    if config.schedule.kind == "free":
        _refuse_free(config)
    if (config.partition.kind == "given") != bool(config.partition.stages):
        raise ConfigError(
            f"partition.kind = '{config.partition.kind}' and partition.stages = {list(config.partition.stages)}: "
            "stages belong to kind 'given', for example partition.kind=given partition.stages=[2,2]"
        )
    if config.optim.schedule == "cosine" and config.train.epochs == 1 and config.optim.warmup_epochs == 0:
        raise ConfigError(
            "train.epochs = 1 with the cosine schedule and no warm-up has learning rate 0 throughout; "
            "use optim.schedule=constant or more epochs"
        )
    if config.optim.nesterov and config.optim.name == "sgd" and config.optim.momentum == 0:
        raise ConfigError("optim.momentum = 0 with optim.nesterov = true; set optim.nesterov=false")
    return config


def _refuse_free(config: Config) -> None:
    """Without waiting there is no gradient from the next module and no batch in parts."""
    if config.model.modules > 1 and config.hierarchy.cascade_span > 1:
        raise ConfigError(
            f"schedule.kind = 'free' with hierarchy.cascade_span = {config.hierarchy.cascade_span}: a cascade's "
            "gradient belongs to one batch, and free stages train on different ones; use hierarchy.cascade_span=1 or "
            "schedule.kind=async"
        )
    if config.schedule.micro_batches > 1:
        raise ConfigError(
            f"schedule.kind = 'free' with schedule.micro_batches = {config.schedule.micro_batches}: the replay ring "
            "holds whole batches; use schedule.micro_batches=1"
        )


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _get(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for section, entries in values.items():
        if isinstance(entries, Mapping):
            into.setdefault(section, {}).update(entries)
        else:
            into[section] = entries


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None


def _parse(text: str) -> Any:
    """A value as TOML writes it; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return {"True": True, "False": False}.get(text, text)


def _convert(key: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = options[0]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value):
            if typing.get_args(kind)[0] is float:
                return tuple(float(x) for x in value)
            if all(isinstance(x, int) and x > 0 for x in value):
                return tuple(value)
            raise ConfigError(f"{key} = {value!r} must be a list of positive integers, for example [2, 2]")
        raise ConfigError(f"{key} = {value!r} must be a list of numbers, for example [5.0, 0.5]")
    if kind is str and isinstance(value, str):
        return ALIASES.get(key, {}).get(value, value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{key} = {value!r} must be {names[kind]}")
