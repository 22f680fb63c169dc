"""The whole run on one rank: agree, build, resume, train, report, save.

    config -> checkpoint? -> DataSpec -> Plan -> Stage + edges -> Loop [train, test, report, save] -> weights
    beginning.py              ...            building.py           loop.py                            ending.py

Every rank runs the same code; only the first stage reads images and only rank 0 writes the screen and the files of the
run (a checkpoint is written by all ranks of the first replica).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.base.config import Config
from pipeline.base.toml import to_toml
from pipeline.base.validation import validate
from pipeline.data.loader_source import LoaderData
from pipeline.data.named import task_of
from pipeline.edges.wire import Directive
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Task
from pipeline.plan.assembly import build_modules, describe, write_plan
from pipeline.plan.level_choice import levels_line
from pipeline.plan.measured_placement import placed_plan
from pipeline.ranks.grid import grid_of
from pipeline.ranks.runtime import Runtime
from pipeline.report.loggers import Loggers
from pipeline.report.view import open_view
from pipeline.run import tracing
from pipeline.run.beginning import (
    agree_on_all,
    asked_to_stop,
    begin,
    cut_network,
    named_after,
    open_source,
    pretrained_weights,
    refuse_early,
    show_beginning,
)
from pipeline.run.building import (
    connect_stage,
    connect_twins,
    explained_failures,
    inlet_of,
    open_checkpoint,
    restore,
    stage_of,
)
from pipeline.run.ending import Outcome, draw_curve, finish, stopped, unsaved, without_curve
from pipeline.run.loop import Loop, Run, saves_parts
from pipeline.run.orders import SaveOrStop, shared
from pipeline.run.telemetry import Telemetry
from pipeline.stage.schedule import Action
from pipeline.stage.watch import Watch
from pipeline.store import checkpoint
from pipeline.store.run_directory import PLAN, json_ready
from pipeline.store.saver import SaveFailed, Saver

ActionHook = Callable[[int, Action], None]


def train(
    config: Config,
    *,
    network: nn.Module | None = None,
    data: LoaderData | None = None,
    task: Task | None = None,
    run_dir: Path | str | None = None,
    resume: str = "auto",
    quiet: bool = False,
    before_action: ActionHook | None = None,
    trace: bool = False,
    draw: bool = True,
) -> dict[str, Any]:
    """Train, test and save. Call it on every rank (under torchrun), or in one process.

    Args:
        config: from :func:`pipeline.load_config`.
        network: a network of your own, cut where one tensor flows or before the modules that ``model.cuts`` names
            (see :mod:`pipeline.models.custom`); its weights are kept and updated in place on the rank that owns them.
            Without it ``config.model.name`` is built and initialised from ``config.train.seed``.
        task: what your own network is for; without it, what ``config.data.name`` is for, or classification of the
            data's classes.
        data: your own loaders; only rank 0 reads from them, or the first stage of every replica. Without it
            ``config.data.name`` is opened.
        run_dir: where config.toml, metrics.jsonl, checkpoints, summary.json, model.pt, heads.pt go; default
            ``runs/<name>-<time>``.
        resume: "auto": go on from the newest valid checkpoint in ``run_dir``, if there is one; "none": begin anew; else
            the path of a checkpoint or of a run.
        quiet: print only the final report.
        before_action: called with (step, action) before every action of this rank's schedule.
        trace: write what every rank did when: trace.json (Chrome, Perfetto) and, with matplotlib, trace.png.
        draw: whether ``trace`` draws the picture; it takes a second.

    Returns:
        The contents of summary.json, on every rank. For a run that a signal has stopped: ``stopped`` (why), ``step``,
        ``checkpoint`` (None before the first step), ``run_directory``.

    Raises:
        Exception: in one process, whatever it was, with a note that says where, and with its traceback in the run
            directory: ConfigError for what is refused before the first step, NonFiniteError, MemoryExhausted,
            DataError, SaveFailed, KeyboardInterrupt. On several ranks nothing: a failure on any rank ends all processes
            with one line (see :class:`pipeline.ranks.failure.FailureReporter`).

    The first SIGTERM or SIGINT on any rank stops all ranks after the same step, with a checkpoint; a second SIGINT at
    once.
    """
    settings = config.runtime
    limits = (settings.deadline_s, settings.setup_deadline_s)
    with Runtime(settings.device, settings.threads, *limits, graceful=True) as runtime, ExitStack() as held:
        team, failures = runtime.team, runtime.failures
        config = named_after(validate(config), network, data)

        failures.progress(-1, -1, "choosing where to start")  # the cheap refusals first
        grid = grid_of(config, team.rank, team.size)
        numerics = refuse_early(config, network, task, runtime, grid)
        task = task if task is not None or data is not None else task_of(config)
        agree_on_all(team, config, task)
        start, directory, lock = begin(config, task, run_dir, resume, runtime, grid, held)
        reason = asked_to_stop(runtime)
        if reason is not None and start.checkpoint is None:  # before what may take minutes
            return stopped(team, Outcome(directory, reason, 0, None))

        failures.progress(-1, -1, "opening the data")
        source, data_spec = open_source(config, data, numerics, runtime, grid, task)
        failures.progress(-1, -1, "placing the local modules")
        config, blocks, task, cut = cut_network(config, network, data_spec, task, start, team)
        pretrained = pretrained_weights(config, blocks, task, start, team)
        spec, together = data_spec.inputs, start.levels_together
        plan, placement = placed_plan(config, blocks, task, numerics, runtime, spec, together, grid)
        if team.leads:
            directory.write_config(to_toml(config))  # with the cuts of this run
            write_plan(plan, directory.path / PLAN)
        failures.describe(grid.named(plan.stage_label(grid.stage)))

        failures.progress(-1, -1, "building the local modules")
        view = held.enter_context(closing(open_view(quiet=quiet))) if team.leads else None
        if view is not None:
            failures.before_exit(view.close)  # a live view hides the cursor
        watch = Watch(failures.progress, before_action, device=runtime.device)
        modules: list[LocalModule] = []
        held.enter_context(explained_failures(runtime, grid, plan, numerics, modules, watch))
        averaging, order_group = connect_twins(runtime, grid)
        among_twins = (grid.replica, averaging.twins.group if averaging is not None else None)
        modules += build_modules(plan, grid.stage, blocks, numerics, network is None, pretrained, *among_twins)
        begins = str(pretrained or "")
        del blocks, pretrained  # of the other stages too
        saved = open_checkpoint(start, plan, data_spec)
        edges = connect_stage(plan, numerics, runtime, grid)
        recorder = watch.recorder = tracing.attach(runtime, plan.stages[grid.stage], edges) if trace else None
        orders = SaveOrStop(config.checkpoint, failures.stop_request)
        inlet = inlet_of(edges, source, config, shared(orders, order_group, grid, data_spec), failures.progress)
        stage = stage_of(plan, grid.stage, modules, inlet, edges, watch, averaging)
        position, records = restore(stage, saved, grid)
        if averaging is not None and saved is None:
            averaging.begin_alike(modules)
        devices = team.gather(str(runtime.device))
        if view is not None:
            goes_on = f"resumed from {start.checkpoint} (step {position.step})" if start.checkpoint else ""
            note = tracing.cannot_draw() if trace and draw else ""
            about = [*describe(plan, numerics, devices or []), cut, placement, levels_line(plan), begins]
            lines = [*about, goes_on, *start.lines, note, without_curve() if config.log.curve else ""]
            show_beginning(view, start.warnings, lines, plan.labels())

        folder = directory.path / checkpoint.FOLDER
        loggers = Loggers(config.log.to, directory.path, json_ready(dataclasses.asdict(config)))
        held.callback(loggers.close)
        writers = range(team.size if saves_parts(plan) else grid.stages)
        run = Run(
            config=config,
            runtime=runtime,
            grid=grid,
            plan=plan,
            stage=stage,
            edges=edges,
            data_spec=data_spec,
            telemetry=Telemetry(
                team, plan, runtime.device, team.broadcast(not quiet), source.rate if source is not None else None
            ),
            directory=directory,
            lock=lock,
            saver=Saver(team, folder, config.checkpoint, writers, grid.replica),
            orders=orders,
            view=view,
            loggers=loggers,
            custom_network=network is not None,
        )
        loop = Loop(run, position, records, saved=start.checkpoint is not None and start.checkpoint.parent == folder)
        if team.leads:
            directory.begin_metrics(loop.records)
            loop.begin_loggers()
        reason = asked_to_stop(runtime)
        if reason is not None:
            edges.close()
            return stopped(team, Outcome(directory, reason, loop.step, start.checkpoint), view)

        outcome = loop.run()
        problem = loop.finish()
        edges.close()
        if outcome is Directive.STOP:
            if problem is not None:
                raise SaveFailed(f"stopped at step {loop.step}, but {unsaved(problem)}")
            reason = team.broadcast(orders.reason)
            assert reason is not None  # that is why it stops
            return stopped(team, Outcome(directory, reason, loop.step, checkpoint.step_folder(folder, loop.step)), view)
        summary = finish(run, loop, modules)
        if team.leads and config.log.curve:
            draw_curve(directory)
        if recorder is not None:
            steps = min(data_spec.train_batches, loop.total)
            for note in tracing.write(runtime, recorder, plan, directory.path, steps, draw):
                print(note)
        if problem is not None:
            raise SaveFailed(f"the run is complete, but {unsaved(problem)}")
        return summary
