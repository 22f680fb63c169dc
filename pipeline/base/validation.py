"""Which configurations are valid: names and types of the keys, their values, and what does not go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.base.config import Config, LevelWeight, ScheduleConfig, sections, settings
from pipeline.base.cut_tables import modules_of_cut
from pipeline.base.data_config import SEGMENTED, TEXT
from pipeline.base.errors import ConfigError, shown, suggest

COMPARES_ROWS = ("predsim", "infopro-contrast", "deinforeg")
ALIASES = {
    "method.name": {"infopro-softmax": "infopro"},
    "precision.compute": {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16"},
}


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """Build a :class:`Config` from nested dictionaries, checking names and types.

    Raises:
        ConfigError: names the key that is unknown or has a value of another type.
    """
    built: dict[str, Any] = {}
    for section, entries in values.items():
        if section not in sections():
            raise ConfigError(f"unknown section {shown(section)} in the configuration; {suggest(section, sections())}")
        if not isinstance(entries, Mapping):
            raise ConfigError(f"'{section}' is a section, not a value; write {section}.key = value")
        checked = {}
        for name, value in entries.items():
            key = f"{section}.{name}"
            if key not in settings():
                raise ConfigError(f"unknown key {shown(key)}; {suggest(key, settings())}")
            converted = settings()[key].convert(value)
            checked[name] = ALIASES.get(key, {}).get(converted, converted) if isinstance(value, str) else converted
        built[section] = sections()[section](**checked)
    return Config(**built)


def validate(config: Config) -> Config:
    """Check every value that can be checked without data or model, and fill in variant-dependent defaults.

    Raises:
        ConfigError: names the first value that cannot work, its key and the fix.
    """
    check_values(config)
    check_combinations(config)
    independent, cascade = {"paper": (1.0, 1.0), "released": (0.001, 0.999), "deepsup": (0.0, 1.0)}[
        config.hierarchy.variant
    ]
    values: dict[str, Any] = {
        "hierarchy.independent_weight": _default(config.hierarchy.independent_weight, independent),
        "hierarchy.cascade_weight": _default(config.hierarchy.cascade_weight, cascade),
    }
    if config.hierarchy.variant == "deepsup":
        values["hierarchy.cascade_span"] = config.model.modules
    return with_values(config, values)


def value_of(config: Config, key: str) -> Any:
    """The value of ``section.name``."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values of some keys (``section.name``)."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


def check_values(config: Config) -> None:
    """Check every key alone, against the range or the choices that stand beside its field.

    Raises:
        ConfigError: names the key, its value, and what is valid.
    """
    for key, setting in settings().items():
        value = value_of(config, key)
        if value is not None:
            setting.check(setting.convert(value))


def check_combinations(config: Config) -> None:
    """Check what does not go together.

    Raises:
        ConfigError: names the keys and the fix.
    """
    batch, parts = config.data.batch_size, config.schedule.micro_batches
    if isinstance(config.parallel.replicas, int):
        check_replicas(config, config.parallel.replicas)
    elif not config.parallel.stages:
        raise ConfigError(
            "parallel.replicas = 'auto' with parallel.stages = 0: set parallel.stages to the processes of one pipeline"
        )
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
    for name, kind in (("delay", "async"), ("ring", "free"), ("max_uses", "free")):
        value = getattr(config.schedule, name)
        if config.schedule.kind != kind and value != getattr(ScheduleConfig(), name):
            raise ConfigError(
                f"schedule.{name} = {value} with schedule.kind = '{config.schedule.kind}': it belongs to '{kind}'; "
                f"remove it or use schedule.kind={kind}"
            )
    if isinstance(config.model.cuts, tuple) and config.model.modules != len(config.model.cuts) + 1:
        raise ConfigError(
            f"model.cuts = {shown(list(config.model.cuts))} makes {len(config.model.cuts) + 1} local modules, but "
            f"model.modules = {config.model.modules}; use model.modules={len(config.model.cuts) + 1}, or other cuts"
        )
    _refuse_groups(config)
    if config.model.modules > 1 and config.hierarchy.cascade_span > config.model.modules:
        raise ConfigError(
            f"hierarchy.cascade_span = {config.hierarchy.cascade_span} is larger than model.modules = "
            f"{config.model.modules}; the largest span is K, which is end-to-end flow"
        )
    if config.hierarchy.variant == "deepsup":
        _refuse_parts_of_the_network(config)
    if config.hierarchy.variant == "released":
        for name in ("independent_weight", "cascade_weight"):
            if isinstance(value := getattr(config.hierarchy, name), tuple):
                raise ConfigError(
                    f"hierarchy.{name} = {shown(list(value))} with hierarchy.variant = 'released', whose last loss has "
                    "constant shares of both levels; give one number"
                )
    if config.method.front != "none" and config.hierarchy.levels != "separate":
        raise ConfigError(
            f"method.front = '{config.method.front}' with hierarchy.levels = '{config.hierarchy.levels}': the heads of "
            "either level stand behind copies of their own; use hierarchy.levels=separate"
        )
    if config.method.reconciliation > 0:
        _refuse_unreconciled(config)
    if config.patches.statistics == "shared" and config.patches.grid > 1:
        _refuse_shared_statistics(config)
    if config.schedule.kind == "free":
        _refuse_free(config)
    if config.optim.error_feedback and (config.schedule.kind != "async" or config.schedule.delay == 0):
        raise ConfigError(
            f"optim.error_feedback = true with schedule.kind = '{config.schedule.kind}' and schedule.delay = "
            f"{config.schedule.delay}: no update is late by declaration; use schedule.kind=async with a delay, or "
            "remove it"
        )
    if config.optim.error_feedback and config.train.accumulate > 1:
        raise ConfigError(
            f"optim.error_feedback = true with train.accumulate = {config.train.accumulate}: an update that comes late "
            "by batches is not late by updates; remove one of them"
        )
    if (config.partition.kind == "given") != bool(config.partition.stages):
        stages = shown(list(config.partition.stages))
        raise ConfigError(
            f"partition.kind = '{config.partition.kind}' and partition.stages = {stages}: "
            "stages belong to kind 'given', for example partition.kind=given partition.stages=[2,2]"
        )
    _check_targets(config)
    if config.optim.schedule == "poly" and (config.optim.lr < config.optim.min_lr or config.optim.warmup_epochs):
        raise ConfigError(
            f"optim.schedule = 'poly' falls from optim.lr = {config.optim.lr:g} to optim.min_lr = "
            f"{config.optim.min_lr:g}, without a warm-up; lower optim.min_lr or set optim.warmup_epochs=0"
        )
    if config.optim.schedule == "cosine" and config.train.epochs == 1 and config.optim.warmup_epochs == 0:
        raise ConfigError(
            "train.epochs = 1 with the cosine schedule and no warm-up has learning rate 0 throughout; "
            "use optim.schedule=constant or more epochs"
        )
    if config.optim.nesterov and config.optim.name == "sgd" and config.optim.momentum == 0:
        raise ConfigError("optim.momentum = 0 with optim.nesterov = true; set optim.nesterov=false")


def _check_targets(config: Config) -> None:
    """What is made of labels must be there to be made, and what compares classes needs whole ones."""
    data = config.data
    mixed = next((name for name in ("mixup", "cutmix") if getattr(data, name) > 0), "")
    if mixed and data.name == "loader":
        raise ConfigError(
            f"data.{mixed} = {getattr(data, mixed):g} with loaders of your own: mix in their collate_fn "
            "(torchvision.transforms.v2.MixUp) and pass task=Classification(classes, shape, soft=True)"
        )
    spread = {f"data.{mixed}": getattr(data, mixed)} if mixed else {}
    if config.train.label_smoothing > 0:
        spread["train.label_smoothing"] = config.train.label_smoothing
    if spread and data.name in (*SEGMENTED, TEXT):
        (key, value), *_ = spread.items()
        place = "byte" if data.name == TEXT else "pixel"
        raise ConfigError(
            f"{key} = {value:g} with data.name = '{data.name}': it spreads classes of whole images, and these have one "
            f"for every {place}; remove it"
        )
    if data.test_scales == ():
        raise ConfigError("data.test_scales = [] leaves nothing to test; use [1.0]")


def check_replicas(config: Config, replicas: int) -> None:
    """Whether ``config`` can be trained on so many replicas. As many as there happen to be (``parallel.replicas`` =
    auto) need not have equal parts of a batch: a job that has lost a machine goes on.

    Raises:
        ConfigError: names the keys and the fix.
    """
    batch, parts, kind = config.data.batch_size, config.schedule.micro_batches, config.schedule.kind
    if replicas == 1:
        if config.parallel.sync_batch_norm:
            raise ConfigError("parallel.sync_batch_norm = true with one replica, where nothing is to be synchronised")
        return
    many = f"parallel.replicas = {replicas}"
    if isinstance(config.parallel.replicas, int) and batch % (replicas * parts):
        both = f" x schedule.micro_batches = {parts}" if parts > 1 else ""
        least = replicas * parts
        raise ConfigError(
            f"data.batch_size = {batch} is not divisible by {many}{both}; use a multiple of {least}, for example "
            f"{batch + least - batch % least}"
        )
    if batch < 2 * replicas * parts:
        raise ConfigError(
            f"data.batch_size = {batch} with {many} leaves BatchNorm one image; use fewer replicas or a larger batch"
        )
    if kind == "free":
        raise ConfigError(
            f"{many} with schedule.kind = 'free', where the stages of two replicas are at no common step; use "
            "schedule.kind=exact, async, or one replica"
        )
    if config.parallel.sync_batch_norm and config.runtime.device == "cpu":
        raise ConfigError(
            "parallel.sync_batch_norm = true with runtime.device = 'cpu': torch.nn.SyncBatchNorm needs GPUs; leave it "
            "out"
        )
    if config.parallel.sync_batch_norm and config.method.reconciliation > 0:
        raise ConfigError(
            f"parallel.sync_batch_norm = true with method.reconciliation = {config.method.reconciliation:g}: "
            "torch.nn.SyncBatchNorm cannot be differentiated twice; remove one of them"
        )


def _refuse_groups(config: Config) -> None:
    """Groups of local modules that are not of this cut, or fewer than a cascade reaches."""
    model, hierarchy, groups = config.model, config.hierarchy, config.local_modules
    if model.group == 1:
        return
    where = f"model.group = {shown(list(model.group) if isinstance(model.group, tuple) else model.group)}"
    built = modules_of_cut(model.name, model.modules, model.cuts)
    if isinstance(model.group, tuple) and sum(model.group) != built:
        raise ConfigError(
            f"{where} joins {sum(model.group)} local modules, but the cut of model.modules = {model.modules} makes "
            f"{built}; let the list add up to {built}"
        )
    if hierarchy.variant == "released":
        raise ConfigError(
            f"{where} with hierarchy.variant = 'released', whose weights go by the K of its own cuts; use "
            "hierarchy.variant=paper"
        )
    if hierarchy.variant == "paper" and hierarchy.cascade_span > groups > 1:
        raise ConfigError(
            f"{where} makes {groups} local modules of {built}, fewer than hierarchy.cascade_span = "
            f"{hierarchy.cascade_span}; the largest span is {groups}"
        )


def _refuse_parts_of_the_network(config: Config) -> None:
    """DeepSup-BP has one level, whose losses flow through everything, as the last one does."""
    hierarchy, modules = config.hierarchy, config.model.modules
    for name, value, whole in (
        ("independent_weight", hierarchy.independent_weight, hierarchy.independent_weight in (None, 0.0)),
        ("cascade_span", hierarchy.cascade_span, hierarchy.cascade_span in (1, modules)),
        ("final_loss", hierarchy.final_loss, hierarchy.final_loss != "local"),
    ):
        if not whole:
            raise ConfigError(
                f"hierarchy.{name} = {shown(value)} with hierarchy.variant = 'deepsup', where every loss flows through "
                "the whole network; remove it"
            )
    if modules > 1 and config.schedule.kind == "free":
        raise ConfigError(
            "hierarchy.variant = 'deepsup' with schedule.kind = 'free': its gradients flow through all modules, and "
            "free stages train on different batches; use schedule.kind=exact"
        )


def _refuse_unreconciled(config: Config) -> None:
    """SGR is for gradient-isolated modules that have a local loss, which is differentiated twice."""
    hierarchy, where = config.hierarchy, f"method.reconciliation = {config.method.reconciliation:g}"
    for key, value, fits in (
        ("hierarchy.variant", hierarchy.variant, hierarchy.variant == "paper"),
        ("hierarchy.cascade_span", hierarchy.cascade_span, hierarchy.cascade_span == 1),
        ("hierarchy.independent_weight", hierarchy.independent_weight, hierarchy.independent_weight != 0),
    ):
        if not fits:
            raise ConfigError(
                f"{where} with {key} = {shown(value)}: it is for modules that no gradient leaves, each with a local "
                "loss; remove one of them"
            )
    if config.method.name in ("infopro", "infopro-contrast"):
        raise ConfigError(
            f"{where} with method.name = '{config.method.name}', whose reconstruction cannot be differentiated twice; "
            "use dgl, greedy, predsim, auglocal or deinforeg"
        )
    if config.precision.compile:
        raise ConfigError(f"{where} with precision.compile = true: compiled heads cannot be differentiated twice")
    if config.precision.cuda_graphs:
        raise ConfigError(
            f"{where} with precision.cuda_graphs = true: what is differentiated twice has not been tried in graphs; "
            "remove one of them"
        )


def _refuse_shared_statistics(config: Config) -> None:
    """Patches are then rows of one batch, which is the same loss only where a loss is a mean over rows."""
    where = "patches.statistics = 'shared'"
    if config.method.name in COMPARES_ROWS:
        raise ConfigError(
            f"{where} with method.name = '{config.method.name}', whose loss compares the rows of a batch, and so the "
            "patches of one image with each other; use patches.statistics=patch"
        )
    if config.hierarchy.variant == "released":
        raise ConfigError(
            f"{where} with hierarchy.variant = 'released', which has a decoder for every patch; use "
            "hierarchy.variant=paper"
        )


def _refuse_free(config: Config) -> None:
    """Without waiting there is no gradient from the next module and no batch in parts."""
    if config.local_modules > 1 and config.hierarchy.cascade_span > 1:
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


def _default(value: LevelWeight | None, default: float) -> LevelWeight:
    return default if value is None else value
