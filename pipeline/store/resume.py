"""Where a run starts: which checkpoint it goes on from, and whether its configuration allows that.

    --resume auto     the newest valid checkpoint of the run directory, else from the beginning (others are set aside)
    --resume PATH     that one, or an error
    --resume none     from the beginning
    a restart         (torchrun --max-restarts) as auto, whatever was asked for at first
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.config import Config
from pipeline.base.errors import CheckpointError, ConfigError
from pipeline.base.metric import ERROR, MetricForm
from pipeline.base.validation import with_values
from pipeline.local.task import Task, task_name
from pipeline.plan.cut import COUNTED
from pipeline.store.atomic import remove_temporaries
from pipeline.store.checkpoint import (
    FOLDER,
    Checkpoint,
    newest_valid,
    open_checkpoint,
    remove_partial,
    set_aside,
    step_folders,
)
from pipeline.store.records import EpochRecord, ModuleRecord, StageRecord
from pipeline.store.run_directory import SUMMARY

MAY_CHANGE = frozenset(
    {
        *("train.epochs", "train.max_steps", "train.evaluate_every", "train.nonfinite"),
        *("data.root", "data.download", "data.cache_gib"),
        *("optim.lr", "optim.momentum", "optim.nesterov", "optim.weight_decay", "optim.schedule"),
        *("optim.warmup_epochs", "optim.warmup_lr", "optim.clip_norm"),
        *("method.reconstruction", "method.task", "method.temperature", "method.similarity"),
        *("hierarchy.independent_weight", "hierarchy.cascade_weight"),
        *("precision.channels_last", "precision.compile", "precision.cuda_graphs", "precision.layers"),
        "patches.at_once",
        *("parallel.replicas", "parallel.stages", "parallel.sync_batch_norm"),
    }
)
"""Keys that may differ from those of the checkpoint, besides all of FREE_SECTIONS. The others decide the shape of a
tensor, the meaning of a step, or which images it sees."""
FREE_SECTIONS = ("partition", "checkpoint", "log", "runtime")


@dataclass(frozen=True)
class Position:
    """Where a run stands between two steps.

    Attributes:
        step: training steps done.
        finished_epochs: epochs that have been trained, tested and reported.
        late_since: first step whose late work may be open, which only schedule `async` has; ``step`` where none is.
        images, wall_s: of the epoch at work so far.
    """

    step: int = 0
    finished_epochs: int = 0
    late_since: int = 0
    images: int = 0
    wall_s: float = 0.0

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Position:
        """The position of a checkpoint."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: checkpoint.manifest[name] for name in names})


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: to go on from; None: the beginning.
        lines, warnings: what the user should know.
        levels_together: see :meth:`pipeline.store.checkpoint.Checkpoint.levels_together`.
        cuts: ``model.cuts`` of the checkpoint where the configuration says "cost" or "memory", which choose only when a
            run begins.
    """

    checkpoint: Path | None
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    levels_together: tuple[int, ...] | None = None
    cuts: str | tuple[str, ...] | None = None


def choose_start(
    resume: str, run_dir: Path, restarted: bool, config: Config, task: Task | None = None, ranks: int = 1
) -> Start:
    """Decide on rank 0 of ``ranks``, and tidy up what killed runs have left in ``run_dir``. ``task``: what the network
    is for, None: classification.

    Raises:
        CheckpointError: ``resume`` is a path without a valid checkpoint; the checkpoint is of another task.
        ConfigError: the run directory holds a finished run without checkpoints, or checkpoints that are not to be used;
            a key that may not change differs from the checkpoint's.
    """
    checkpoints = run_dir / FOLDER
    remove_temporaries(run_dir)
    warnings = [f"removed the unfinished checkpoint {name}" for name in remove_partial(checkpoints)]
    chosen: Checkpoint | None = None
    if restarted or resume == "auto":
        chosen, refused = newest_valid(checkpoints)
        if chosen is None and refused:
            warnings.append("no checkpoint of this run is valid: it begins anew")
        for path in step_folders(checkpoints)[: len(refused)]:
            set_aside(path)
        warnings += [f"{reason}; set aside as *.invalid" for reason in refused]
    elif step_folders(checkpoints):
        raise ConfigError(
            f"run directory '{run_dir}' already holds checkpoints; go on from the newest with --resume auto, or choose "
            "another --run-dir"
        )
    if chosen is None and resume not in ("auto", "none"):
        chosen = open_checkpoint(Path(resume).absolute())
    if chosen is None:
        if resume == "auto" and not restarted and (run_dir / SUMMARY).exists():
            raise ConfigError(
                f"run directory '{run_dir}' already holds a run ({SUMMARY}) without checkpoints; choose another with "
                "--run-dir or delete it"
            )
        return Start(None, (), tuple(warnings))
    if chosen.task != task_name(task):
        raise CheckpointError(
            f"checkpoint '{chosen.path}' is of the task {chosen.task}, this run of the task {task_name(task)}; pass "
            "the task that was trained, or start anew with --resume none and another --run-dir"
        )
    warnings += [chosen.older] if chosen.older is not None else []
    cuts = chosen.config.model.cuts if config.model.cuts in COUNTED else None
    lines = _changes(chosen, with_values(config, {"model.cuts": cuts}) if cuts is not None else config)
    if isinstance(cuts, str) and cuts not in COUNTED and config.model.modules > 1:
        word = config.model.cuts
        lines.append(f"model.cuts = {cuts!r} of the checkpoint stays: {word!r} chooses only when a run begins")
    return Start(chosen.path, tuple(lines), tuple(warnings), chosen.levels_together(ranks), cuts)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Key -> (old, new) value of everything that differs."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return {
        f"{section}.{name}": (before[section][name], value)
        for section, entries in after.items()
        for name, value in entries.items()
        if before[section][name] != value
    }


def check_fits(
    checkpoint: Checkpoint,
    modules: list[list[str]],
    classes: int,
    image_shape: tuple[int, ...],
    train_batches: int,
    total_steps: int,
) -> None:
    """Whether network and data are those of the checkpoint, and the run is not over before it.

    Raises:
        CheckpointError: they are not, or it is.
    """
    if checkpoint.step > total_steps:
        raise CheckpointError(
            f"checkpoint '{checkpoint.path}' is of step {checkpoint.step}, but train.epochs and train.max_steps end "
            f"the run at step {total_steps}; train longer, or resume an earlier checkpoint"
        )
    for name, there, here in (
        ("the blocks of the local modules", checkpoint.module_names, modules),
        ("classes", checkpoint.classes, classes),
        ("the shape of an image", checkpoint.image_shape, tuple(image_shape)),
        ("training batches of an epoch", checkpoint.manifest["train_batches"], train_batches),
    ):
        if there != here:
            raise CheckpointError(
                f"checkpoint '{checkpoint.path}' is of another run: {name}: {there} there, {here} here; use the same "
                "network and data, or --resume none"
            )


def records_of(checkpoint: Checkpoint) -> list[EpochRecord]:
    """The records of its finished epochs."""
    return [
        EpochRecord(
            **{
                **entry,
                "stages": tuple(StageRecord(**{**s, "modules": tuple(s["modules"])}) for s in entry["stages"]),
                "modules": tuple(ModuleRecord(**m) for m in entry["modules"]),
                "metric": MetricForm(**entry["metric"]) if "metric" in entry else ERROR,
            }
        )
        for entry in checkpoint.history()
    ]


def _changes(checkpoint: Checkpoint, config: Config) -> list[str]:
    """What differs from the checkpoint's configuration, a line per key."""
    changed = differences(checkpoint.config, config)
    refused = {
        key: values
        for key, values in changed.items()
        if key not in MAY_CHANGE and key.partition(".")[0] not in FREE_SECTIONS
    }
    if refused:
        texts = ", ".join(f"{key} ({old!r} there, {new!r} now)" for key, (old, new) in refused.items())
        raise ConfigError(
            f"checkpoint '{checkpoint.path}' cannot go on with a change of {texts}; set the old value, or start anew "
            "with --resume none and another --run-dir"
        )
    return [f"changed since the checkpoint: {key} = {old!r} -> {new!r}" for key, (old, new) in changed.items()]
