"""How a run begins: what is refused at once, what all ranks agree on, where it goes on, its data and its network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError, warn
from pipeline.base.flow import LABEL
from pipeline.base.numerics import Numerics, resolve_numerics
from pipeline.base.paths import path_of, text_of
from pipeline.base.toml import to_toml
from pipeline.base.validation import validate, with_values
from pipeline.base.version import code_version
from pipeline.data.loader_source import LoaderData, LoaderSource
from pipeline.data.named import open_named
from pipeline.data.share import Share
from pipeline.data.source import DataSpec, Source
from pipeline.local.compilation import refuse_without_compiler
from pipeline.local.graphs import refuse_without_gpu
from pipeline.local.task import Classification, Task, classification, refuse_unusable, task_name
from pipeline.models.backbones import Blocks
from pipeline.models.custom import network_blocks
from pipeline.models.pretrained import PretrainedWeights, sha256_of
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan.cost_cut import cut_by_cost
from pipeline.plan.cut import COUNTED, make_cut
from pipeline.plan.placement import given, place
from pipeline.ranks.agreement import agree_on_config
from pipeline.ranks.grid import Grid
from pipeline.ranks.keys import Key
from pipeline.ranks.runtime import Runtime
from pipeline.ranks.team import Team
from pipeline.report.loggers import refuse_missing_loggers
from pipeline.report.view import View
from pipeline.store.resume import Start, choose_start
from pipeline.store.run_directory import CONFIG, RunDirectory
from pipeline.store.run_lock import RunLock


def named_after(config: Config, network: nn.Module | None, data: LoaderData | None) -> Config:
    """The configuration with the names and the batch size of a user's own network and loaders."""
    if network is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name="custom"))
    if data is not None:
        batch = getattr(data.train, "batch_size", None) or config.data.batch_size
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name="loader", batch_size=batch))
    return validate(config)


def refuse_early(
    config: Config, network: nn.Module | None, task: Task | None, runtime: Runtime, grid: Grid
) -> Numerics:
    """Refusals that need no data: a task that cannot work, more modules than blocks, more ranks than modules, a layout
    that cannot work, a logger that is not installed."""
    if runtime.team.leads:
        refuse_missing_loggers(config)
    if task is not None:
        if network is None or (config.data.name != "loader" and not isinstance(task, Classification)):
            raise ConfigError("a task of your own needs your own network and loaders: pass network=... and data=...")
        refuse_unusable(task)
        mixes = config.data.mixup > 0 or config.data.cutmix > 0
        if mixes and not (isinstance(task, Classification) and task.soft):
            raise ConfigError(
                "data.mixup and data.cutmix make shares of classes, which your task does not take; pass "
                "task=Classification(classes, shape, soft=True), or no task"
            )
        smoothing = config.train.label_smoothing
        if smoothing > 0 and not (isinstance(task, Classification) and task.label_smoothing == smoothing):
            raise ConfigError(
                f"train.label_smoothing = {smoothing:g} with a task of your own, whose loss is its own; pass "
                f"task=Classification(classes, shape, label_smoothing={smoothing:g}), or leave the key out"
            )
    blocks = (
        network_blocks(network, config.model.cuts) if network is not None else planned_blocks(config.model.name, 3, 10)
    )
    # How many modules a cut by cost or memory makes is known before anything is counted.
    model = dataclasses.replace(config.model, cuts="auto") if config.model.cuts in COUNTED else config.model
    count = len(make_cut(list(blocks), model))
    if config.partition.kind == "given":
        given(config.partition.stages, count, grid.stages)
    place(count, grid.stages)
    if network is not None and config.model.weights:
        raise ConfigError("model.weights is for networks with a name; load the file into your own and leave it empty")
    if config.parallel.sync_batch_norm and runtime.device.type == "cpu":
        raise ConfigError(
            "parallel.sync_batch_norm = true on CPUs: torch.nn.SyncBatchNorm needs GPUs; leave it out"
        )
    if config.precision.compile:
        refuse_without_compiler(runtime.device)
    if config.precision.cuda_graphs:
        refuse_without_gpu(runtime.device)
    return resolve_numerics(config.precision, runtime.device, blocks.values())


def agree_on_all(team: Team, config: Config, task: Task | None) -> None:
    """Refuse to start unless all ranks run the same code for the same task and the same configuration. Collective."""
    team.agree("the version of the code", code_version())
    shape = "" if task is None else f" ({task.classes} classes, inputs of shape {tuple(task.image_shape)})"
    team.agree("the task", task_name(task) + shape)
    agree_on_config(team, config)


def begin(
    config: Config,
    task: Task | None,
    run_dir: Path | str | None,
    resume: str,
    runtime: Runtime,
    grid: Grid,
    held: ExitStack,
) -> tuple[Start, RunDirectory, RunLock | None]:
    """Choose run directory and checkpoint on rank 0 and tell all ranks. Collective.

    The lock of the directory, which only rank 0 has, is kept in ``held``.
    """
    team, start, path, lock = runtime.team, Start(None), None, None
    if team.leads:
        known = team.recall(Key.RUN_DIRECTORY())
        if known is not None:  # torchrun has restarted the workers
            run_dir = path_of(known)
        name = f"{config.model.name}-{config.data.name}".replace("/", "-")
        going_on = known is not None or resume == "auto"
        directory = RunDirectory.create(Path(run_dir) if run_dir is not None else None, name, going_on)
        lock = RunLock(directory.path.absolute())
        held.callback(lock.close)
        path = str(directory.path.absolute())
        start = choose_start(resume, directory.path.absolute(), known is not None, config, task, grid.stages)
        directory.write_config(to_toml(config))
        # Not before: what is refused now must not be done by a restart.
        team.remember(Key.RUN_DIRECTORY(), text_of(path))
    start, path = team.broadcast((start, path))
    assert path is not None  # rank 0 has chosen it
    directory = RunDirectory(Path(path))
    runtime.failures.run_dir = directory.path
    refuse_private_directory(team, directory.path)
    return start, directory, lock


def asked_to_stop(runtime: Runtime) -> str | None:
    """Which signal has come to any rank so far. Collective."""
    requests = runtime.team.gather(runtime.failures.stop_request())
    return runtime.team.broadcast(next((request for request in requests or () if request), None))


def open_source(
    config: Config, data: LoaderData | None, numerics: Numerics, runtime: Runtime, grid: Grid, task: Task | None = None
) -> tuple[Source | None, DataSpec]:
    """The data on the first stages, and what all ranks must know of it. Collective."""
    source: Source | None = None
    share = Share(grid.replica, grid.replicas)

    def opened() -> Source:
        if data is None:
            return open_named(config, numerics, share)
        inputs, target = (None, LABEL) if task is None else (task.inputs, task.target)
        return LoaderSource(data, config, numerics, runtime.failures.progress, inputs, target, share)

    if runtime.team.leads:
        source = opened()
    data_spec = runtime.team.broadcast(source.data_spec if source is not None else None)
    assert data_spec is not None  # rank 0 has opened the data
    if grid.stage == 0 and not grid.leads:  # after rank 0, which may have fetched them
        source = opened()
    return source, data_spec


def cut_network(
    config: Config, network: nn.Module | None, data_spec: DataSpec, task: Task | None, start: Start, team: Team
) -> tuple[Config, Blocks, Task, str]:
    """The configuration with the cuts of this run, the network in blocks, what it is for, and what to tell people about
    a cut that was counted (else ""). Collective.

    Rank 0 counts where ``model.cuts`` is "cost" or "memory"; a run that goes on keeps the cuts it has.
    """
    if start.cuts is not None:
        config = with_values(config, {"model.cuts": start.cuts})
    blocks, found = blocks_and_task(config, network, data_spec, task)
    if config.model.cuts not in COUNTED or config.model.modules == 1:
        return config, blocks, found, ""
    config, words = team.broadcast(
        cut_by_cost(config, blocks, found, data_spec.inputs) if team.leads else (config, "")
    )
    return config, *blocks_and_task(config, network, data_spec, task), words


def pretrained_weights(
    config: Config, blocks: Blocks, task: Task, start: Start, team: Team
) -> PretrainedWeights | None:
    """What ``model.weights`` names, the same on all ranks; None where it names nothing, or the run goes on from a
    checkpoint. Collective."""
    path = config.model.weights
    if not path or start.checkpoint is not None:
        return None
    team.agree("the file of model.weights", sha256_of(path))
    return PretrainedWeights(path, config.model.name, blocks, task.classes)


def blocks_and_task(
    config: Config, network: nn.Module | None, data_spec: DataSpec, task: Task | None = None
) -> tuple[Blocks, Task]:
    """The network in blocks, without weights unless it is the user's own, and what it is for: ``task``, or a
    classification."""
    if task is not None and network is not None:
        if data_spec.classes not in (0, task.classes):
            raise ConfigError(
                f"task {task_name(task)} has {task.classes} classes, '{config.data.name}' has {data_spec.classes}; "
                "make them equal"
            )
        shape = task.image_shape if len(task.image_shape) == 3 else None
        return network_blocks(network, config.model.cuts, shape), task
    if network is None:
        if data_spec.classes == 0:
            raise ConfigError("your own loaders need your own network: pass network=..., an nn.Module")
        channels, *sides = data_spec.image_shape
        blocks = planned_blocks(config.model.name, channels, data_spec.classes, config.train.seed, tuple(sides))
        return blocks, task or classification(config, data_spec.classes, data_spec.image_shape)
    blocks = network_blocks(network, config.model.cuts, data_spec.image_shape)
    return blocks, classification(config, data_spec.classes or _classes_of(blocks), data_spec.image_shape)


def show_beginning(view: View, warnings: Sequence[str], lines: Sequence[str], labels: Sequence[str]) -> None:
    """What people see first (rank 0): a header and ``lines``, of which empty ones are left out; ``labels``: first and
    last block of every local module."""
    for warning in warnings:
        warn(warning)
    header, *others = filter(None, lines)
    view.start(header, others, labels)


def refuse_private_directory(team: Team, run_dir: Path) -> None:
    """All ranks write their checkpoints below the run directory, so on several machines it must be one. Collective.

    Raises:
        ConfigError: a rank does not see what rank 0 has written there.
    """
    seen = team.gather((run_dir / CONFIG).is_file())
    blind = [str(rank) for rank, there in enumerate(seen or ()) if not there]
    blind = team.broadcast(blind)
    if blind:
        raise ConfigError(
            f"run directory '{run_dir}' of rank 0 is not visible on rank {', '.join(blind)}; on several machines use "
            "--run-dir on a file system that all share"
        )


def _classes_of(blocks: Blocks) -> int:
    """Outputs of the last linear layer of a user's network."""
    linear = [m for block in blocks.values() for m in block.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError("the network has no linear layer at its end, so its number of classes is unknown; add one")
    return linear[-1].out_features
