"""A trained network tested in one process: every early exit, and what several exits say together.

    x --> module 0 --+--> module 1 --+--> ... --> output       an exit: a head that does the task, or the network's own
                     |               |              |                   output
                   exits           exits           exit
                   |_______________|  prefix of module 1: the mean of the class probabilities of these exits, where
                                      those of module i count 2^i times (DGL); "all": the plain mean of all exits

The modules are those of a run (assembly), on their own weights and heads; what the last one alone says is what the run
has reported. Only a classification has class probabilities: of another task every exit stands for itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.base.config import Config
from pipeline.base.errors import CheckpointError, ConfigError, warn
from pipeline.base.flow import MAIN, bare, named, passed
from pipeline.base.numerics import Numerics, resolve_numerics
from pipeline.base.recipes import load_config
from pipeline.data.loader_source import LoaderData, LoaderSource
from pipeline.data.named import open_named, task_of
from pipeline.data.source import DataSpec, Source
from pipeline.local.compilation import refuse_without_compiler
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Classification, Task, classification, refuse_unusable, task_name
from pipeline.local.weights import below, networks
from pipeline.models.backbones import Blocks, build_blocks
from pipeline.models.boundaries import blank
from pipeline.models.custom import network_blocks
from pipeline.plan.assembly import Plan, build_modules, make_plan
from pipeline.ranks.runtime import choose_device, set_threads, threads_restored
from pipeline.report.exits import ALL, PREFIX, Evaluation, ExitRow
from pipeline.run.views import ONE, View, outputs_of, views_of
from pipeline.stage.inlet import Batch
from pipeline.store.checkpoint import Checkpoint, open_checkpoint
from pipeline.store.manifest import CONFIG

Statistics = dict[tuple[int, str, str], Tensor]
"""Sums over the test set by (module, exit, metric)."""
EXITS = ("independent", "cascade", "final")
MAY_CHANGE = ("data.", "precision.", "runtime.device", "runtime.threads")


def evaluate(
    source: Path | str,
    assignments: Sequence[str] = (),
    *,
    network: nn.Module | None = None,
    data: LoaderData | None = None,
    task: Task | None = None,
    ema: bool = False,
) -> Evaluation:
    """Test a checkpoint on its test set, in this process.

    Args:
        source: the directory of a checkpoint, or of a run, of which the newest valid checkpoint is taken.
        assignments: ``key=value`` for ``data.*``, ``precision.*``, ``runtime.device`` and ``runtime.threads``; all else
            is as in the checkpoint.
        network: the network that was trained, where it was your own; it gets the weights of the checkpoint.
        data: your own loaders, of which the test loader is used; else ``data.name`` is opened.
        task: what the network was trained for, where that was a task of your own.
        ema: test the moving averages of all weights (``train.ema``) in their place.

    Raises:
        CheckpointError: the checkpoint is incomplete, a file of it has changed, it is of another network or task, or
            it has no averages.
        ConfigError: started on several ranks, a key that may not change, data of other classes or another image size.
    """
    _refuse_ranks()
    _refuse_assignments(assignments)
    saved = open_checkpoint(Path(source))
    if saved.older is not None:
        warn(saved.older)
    config = load_config(file=saved.path / CONFIG, assignments=assignments)
    given = task if task is not None or data is not None else task_of(config)
    task = _task_of(saved, given, config)
    views = views_of(config.data, task)
    _refuse_what_is_missing(saved, config, network, data)
    with threads_restored():
        set_threads(config.runtime.threads, 1)
        shape = task.image_shape if len(task.image_shape) == 3 else None
        blocks = network_blocks(network, config.model.cuts, shape) if network is not None else (
            build_blocks(config.model.name, task.image_shape[0], task.classes, task.image_shape[1:])
        )
        device, _ = choose_device(config.runtime.device, 0, 1)
        if config.precision.compile:
            refuse_without_compiler(device)
        numerics = resolve_numerics(config.precision, device, blocks.values())
        images: Source
        if data is not None:
            inputs = task.inputs if saved.task != task_name(None) else None
            images = LoaderSource(data, config, numerics, None, inputs, task.target)
        else:
            images = open_named(config, numerics, whole=True)
        _refuse_other_data(images.data_spec, task, config)
        plan = make_plan(config, blocks, task, 1, images.data_spec.inputs)
        work = _operations(plan, blocks)
        modules = _restored(saved, plan, blocks, numerics, ema)
        statistics, count = count_exits(modules, images.test(), task, views)
    return Evaluation(
        checkpoint=str(saved.path),
        step=saved.step,
        epoch=saved.epoch,
        network=config.model.name,
        data=config.data.name if data is None else "loader",
        images=count,
        rows=tuple(_rows(plan, blocks, work, statistics, count)),
        task=task_name(task),
        metrics=tuple(metric.form for metric in task.metrics),
        ensembles=isinstance(task, Classification),
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refuse_ranks() -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise ConfigError(f"{ranks} processes were started, but an evaluation is one: start it without torchrun")


def _refuse_assignments(assignments: Iterable[str]) -> None:
    for assignment in assignments:
        key = assignment.partition("=")[0].strip()
        if not key.startswith(MAY_CHANGE[:2]) and key not in MAY_CHANGE[2:]:
            raise ConfigError(
                f"--set {assignment}: '{key}' is as the checkpoint was trained; "
                "only data.*, precision.*, runtime.device and runtime.threads can be set here"
            )


def _task_of(saved: Checkpoint, task: Task | None, config: Config) -> Task:
    """``task``, or classification, if that is what was trained."""
    where = f"checkpoint '{saved.path}'"
    if task is None and saved.task == task_name(None):
        return classification(config, saved.classes, saved.image_shape)
    if task is None:
        raise CheckpointError(
            f"{where} is of the task {saved.task}, which no name can rebuild; call pipeline.evaluate(..., task=...) in "
            "Python"
        )
    if saved.task != task_name(task):
        raise CheckpointError(
            f"{where} is of the task {saved.task}, the one given is {task_name(task)}; pass the task that was trained"
        )
    refuse_unusable(task)
    if (saved.classes, saved.image_shape) != (task.classes, tuple(task.image_shape)):
        raise CheckpointError(
            f"{where} is of {saved.task} with {saved.classes} classes and inputs of shape {saved.image_shape}, the one "
            f"given has {task.classes} and {tuple(task.image_shape)}; pass the task that was trained"
        )
    return task


def _refuse_what_is_missing(
    saved: Checkpoint, config: Config, network: nn.Module | None, data: LoaderData | None
) -> None:
    """Nothing but the caller has a user's own network and loaders."""
    where = f"checkpoint '{saved.path}'"
    if saved.custom_network and network is None:
        raise CheckpointError(
            f"{where} is of a network of your own, which no name can rebuild; call pipeline.evaluate(..., network=...) "
            "in Python"
        )
    if config.data.name == "loader" and data is None:
        raise CheckpointError(
            f"{where} was trained from loaders of your own; call pipeline.evaluate(..., data=LoaderData(...)) in "
            "Python, or set data.name"
        )


def _refuse_other_data(data_spec: DataSpec, task: Task, config: Config) -> None:
    name = config.data.name
    if data_spec.classes not in (0, task.classes):
        raise ConfigError(
            f"'{name}' has {data_spec.classes} classes, the checkpoint was trained for {task.classes}; set data.name "
            "and data.root to data with the same classes"
        )
    expected = task.inputs[MAIN].shape
    if data_spec.image_shape != expected:
        raise ConfigError(
            f"'{name}' has images of shape {data_spec.image_shape}, the checkpoint was trained on {expected}; "
            "set data.image_size, or use other data"
        )


# --- the network ------------------------------------------------------------------------------------------------------


def _operations(plan: Plan, blocks: Blocks) -> list[int]:
    """Operations of the forward pass of one image, or the longest sequence, up to the end of every local module."""
    reference = next((p for block in blocks.values() for p in block.parameters()), torch.zeros(()))
    flow = bare({name: blank(spec, 1, reference.dtype, reference.device) for name, spec in plan.inputs.items()})
    done = []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for names in plan.cut.modules:
            for name in names:
                flow = passed(blocks[name].eval()(flow))
            done.append(counter.get_total_flops())
    return done


def _restored(saved: Checkpoint, plan: Plan, blocks: Blocks, numerics: Numerics, ema: bool) -> list[LocalModule]:
    """All local modules with the weights and heads of the checkpoint, or with ``ema`` their averages."""
    names = [list(names) for names in plan.cut.modules]
    if names != saved.module_names:
        raise CheckpointError(
            f"checkpoint '{saved.path}' has the local modules {saved.module_names}, this network gives {names}; pass "
            "the network that was trained"
        )
    modules = build_modules(plan, 0, blocks, numerics, fresh=False)
    for module in modules:
        state = saved.averages(module.plan.index) if ema else saved.module_state(module.plan.index)
        for prefix, network in networks(module):
            try:
                network.load_state_dict(below(state, prefix))
            except RuntimeError as error:
                cause = " ".join(str(error).split())
                raise CheckpointError(
                    f"checkpoint '{saved.path}' does not fit {prefix[:-1]} of local module {module.plan.index}; pass "
                    f"the network that was trained ({cause})"
                ) from error
    return modules


# --- the test ---------------------------------------------------------------------------------------------------------


def count_exits(
    modules: Sequence[LocalModule], batches: Iterable[Batch], task: Task, views: Sequence[View] = ONE
) -> tuple[Statistics, int]:
    """What the metrics of the task have counted of every exit, and the number of all rows of the test set."""
    statistics: Statistics = {}
    together = isinstance(task, Classification)
    rows = 0

    def count(module: int, name: str, output: Tensor, target: Tensor) -> None:
        for metric in task.metrics:
            key, counted = (module, name, metric.name), metric.count(output, target)
            statistics[key] = statistics[key] + counted if key in statistics else counted

    for batch in batches:
        target = batch.labels
        prefix = mean = torch.zeros((), dtype=torch.float64, device=target.device)
        for module, outputs in zip(modules, outputs_of(modules, named(batch.x), target, views), strict=True):
            index = module.plan.index
            prefix = prefix / 2  # the weights of the next module are twice as large; only their ratio counts
            for level, output in outputs.items():
                count(index, level, output, target)
                if together:
                    probabilities = output.double().softmax(dim=1)
                    prefix, mean = prefix + probabilities, mean + probabilities
            if outputs and together:
                count(index, PREFIX, _scores(prefix), target)
        if together:
            count(modules[-1].plan.index, ALL, _scores(mean), target)
        rows += len(target)
    return statistics, rows


def _scores(weighted: Tensor) -> Tensor:
    """Class scores, as a network gives them, from sums (B, classes) of class probabilities."""
    return (weighted / weighted.sum(dim=1, keepdim=True)).log()


def _rows(
    plan: Plan, blocks: Blocks, work: Sequence[int], statistics: Statistics, rows: int
) -> Iterable[ExitRow]:
    """Rows for people: an ensemble of one exit is left out."""
    exits = parameters = 0
    measured: dict[tuple[int, str], dict[str, float]] = {}
    for metric in plan.task.metrics:
        for index, name, counted in statistics:
            if counted == metric.name:
                measured.setdefault((index, name), {})[counted] = metric.of(statistics[index, name, counted], rows)
    for index, names in enumerate(plan.cut.modules):
        parameters += sum(p.numel() for name in names for p in blocks[name].parameters())
        found = [name for name in EXITS if (index, name) in measured]
        exits += len(found)
        together = [name for name in (PREFIX, ALL) if (index, name) in measured and exits > 1]
        for name in found + together:
            yield ExitRow(
                module=index,
                blocks=plan.cut.label(index),
                exit=name,
                metrics=measured[index, name],
                parameters=parameters,
                operations=work[index] / max(work[-1], 1),
            )
