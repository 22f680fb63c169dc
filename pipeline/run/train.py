"""The whole run on one rank: agree, build, resume, train, report, save.

    config -> checkpoint? -> DataSpec -> Plan -> Stage + edges -> Loop [train, test, report, save] -> weights

Every rank runs the same code; only the first stage reads images and only rank 0 writes the screen and the files of the
run (a checkpoint is written by all).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.base.config import Config
from pipeline.base.errors import LocalpipeError
from pipeline.base.paths import path_of, text_of
from pipeline.base.toml import to_toml
from pipeline.base.validation import validate
from pipeline.base.version import code_version
from pipeline.data.loader_source import LoaderData
from pipeline.data.source import DataSpec, Source
from pipeline.edges.wire import Directive
from pipeline.local.local_module import LocalModule
from pipeline.local.module_state import BUSY, restore_module
from pipeline.local.weights import State, heads_state, model_state, module_weights, weights_sha256
from pipeline.plan.assembly import build_modules, describe, write_plan
from pipeline.plan.measured_placement import placed_plan
from pipeline.plan.memory import explain_out_of_memory
from pipeline.ranks.agreement import agree_on_config
from pipeline.ranks.keys import Key
from pipeline.ranks.runtime import Runtime
from pipeline.report.view import View, open_view
from pipeline.run import tracing
from pipeline.run.conductor import Conductor
from pipeline.run.loop import Loop, Run, total_steps
from pipeline.run.preparation import (
    blocks_and_task,
    connect_stage,
    named_after,
    open_source,
    refuse_early,
    refuse_private_directory,
)
from pipeline.run.telemetry import Telemetry
from pipeline.stage.free import FreeStage
from pipeline.stage.schedule import Action
from pipeline.stage.stage import Stage
from pipeline.store import checkpoint, resume
from pipeline.store.checkpoint import Checkpoint
from pipeline.store.records import EpochRecord
from pipeline.store.resume import Position, Start
from pipeline.store.run_directory import PLAN, RunDirectory, summarise
from pipeline.store.run_lock import RunLock
from pipeline.store.saver import SaveFailed, Saver
from pipeline.store.weights_file import HEADS, MODEL, write_weights

ActionHook = Callable[[int, Action], None]


def train(
    config: Config,
    *,
    network: nn.Sequential | None = None,
    data: LoaderData | None = None,
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
        network: a network of your own, cut between its children; its weights are kept and updated in place on the
            rank that owns them. Without it ``config.model.name`` is built and initialised from ``config.train.seed``.
        data: your own loaders; only rank 0 reads from them. Without it ``config.data.name`` is opened.
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
            with one line (see :class:`pipeline.ranks.failure.FailureDesk`).

    The first SIGTERM or SIGINT on any rank stops all ranks after the same step, with a checkpoint; a second SIGINT at
    once.
    """
    settings = config.runtime
    limits = (settings.deadline_s, settings.setup_deadline_s)
    with Runtime(settings.device, settings.threads, *limits, graceful=True) as runtime:
        trainer = _Trainer(config, runtime, network, data, quiet, before_action, trace, draw)
        try:
            return trainer.run(Path(run_dir) if run_dir is not None else None, resume)
        finally:
            trainer.release()


class _Trainer:
    """State of one call of :func:`train` on one rank."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        network: nn.Sequential | None,
        data: LoaderData | None,
        quiet: bool,
        before_action: ActionHook | None,
        trace: bool,
        draw: bool,
    ) -> None:
        self.runtime = runtime
        self.config = named_after(validate(config), network, data)
        self.network = network
        self.data = data
        self.quiet = quiet
        self.before_action = before_action
        self.trace = trace
        self.draw = draw
        self.leader = runtime.team.leads
        self._lock: RunLock | None = None
        self.modules: list[LocalModule] = []
        self.stage: Stage | None = None
        self.view: View | None = None

    def run(self, run_dir: Path | None, resume_from: str) -> dict[str, Any]:
        """Everything, in order; the cheap refusals first."""
        runtime, config = self.runtime, self.config
        runtime.desk.progress(-1, -1, "choosing where to start")
        self.numerics = refuse_early(config, self.network, runtime)
        self._agree()
        start = self._begin(run_dir, resume_from)
        asked = self._asked_to_stop()
        if asked is not None and start.checkpoint is None:  # before what may take minutes
            return self._stopped(asked, 0, None)
        runtime.desk.progress(-1, -1, "opening the data")
        source, data_spec = open_source(config, self.data, self.numerics, runtime)
        runtime.desk.progress(-1, -1, "placing the local modules")
        blocks, task = blocks_and_task(config, self.network, data_spec)
        self.plan, self._placement = placed_plan(config, blocks, task, self.numerics, runtime)
        if self.leader:
            write_plan(self.plan, self.directory.path / PLAN)
        runtime.desk.describe(self.plan.stage_label(runtime.team.rank))
        runtime.desk.progress(-1, -1, "building the local modules")
        self.view = open_view(quiet=self.quiet) if self.leader else None
        if self.view is not None:
            runtime.desk.before_exit = self.view.close  # a live view hides the cursor
        try:
            self.modules = build_modules(
                self.plan, runtime.team.rank, blocks, self.numerics, fresh=self.network is None
            )
            del blocks  # the other stages' blocks
            saved = self._open(start, data_spec)
            self.stage = self._make_stage()
            position, records = self._restore(saved)
            self._start_view(start, position, data_spec)
            self.loop = self._make_loop(start, source, data_spec, position, records)
            return self._train(start, data_spec)
        except (LocalpipeError, KeyboardInterrupt):
            raise
        except Exception as error:
            explained = explain_out_of_memory(error, self.plan, runtime.team.rank, self.numerics, self.modules)
            runtime.desk.report(explained or error, self._module_at_work())

    def release(self) -> None:
        """Leave the screen and the run directory to others."""
        if self.view is not None:
            self.view.close()
        if self._lock is not None:
            self._lock.close()

    def _train(self, start: Start, data_spec: DataSpec) -> dict[str, Any]:
        runtime = self.runtime
        asked = self._asked_to_stop()
        if asked is not None:
            self.stage.edges.close()
            return self._stopped(asked, self.loop.step, start.checkpoint)
        outcome = self.loop.run()
        problem = self.loop.finish()
        self.stage.edges.close()
        if outcome is Directive.STOP:
            if problem is not None:
                raise SaveFailed(f"stopped at step {self.loop.step}, but {_unsaved(problem)}")
            folder = checkpoint.step_folder(self.directory.path / checkpoint.FOLDER, self.loop.step)
            return self._stopped(runtime.team.broadcast(self.conductor.reason), self.loop.step, folder)
        summary = self._finish()
        if self.recorder is not None:
            steps = min(data_spec.train_batches, self.loop.total)
            for note in tracing.write(runtime, self.recorder, self.plan, self.directory.path, steps, self.draw):
                print(note)
        if problem is not None:
            raise SaveFailed(f"the run is complete, but {_unsaved(problem)}")
        return summary

    # --- before step 0 ------------------------------------------------------------------------------------------------

    def _agree(self) -> None:
        self.runtime.team.agree("the version of the code", code_version())
        agree_on_config(self.runtime.team, self.config)

    def _begin(self, run_dir: Path | None, resume_from: str) -> Start:
        """Choose run directory and checkpoint on rank 0 and tell all ranks. Collective."""
        runtime, config = self.runtime, self.config
        start, path = Start(None), None
        if self.leader:
            known = runtime.team.recall(Key.RUN_DIRECTORY())
            if known is not None:  # torchrun has restarted the workers
                run_dir = Path(path_of(known))
            name = f"{config.model.name}-{config.data.name}"
            going_on = known is not None or resume_from == "auto"
            directory = RunDirectory.create(run_dir, name, going_on)
            self._lock = RunLock(directory.path.absolute())
            path = str(directory.path.absolute())
            start = resume.choose_start(resume_from, directory.path.absolute(), known is not None, config)
            directory.write_config(to_toml(config))
            # Not before: what is refused now must not be done by a restart.
            runtime.team.remember(Key.RUN_DIRECTORY(), text_of(path))
        start, path = runtime.team.broadcast((start, path))
        runtime.desk.run_dir = Path(path)
        self.directory = RunDirectory(Path(path))
        refuse_private_directory(runtime.team, self.directory.path)
        return start

    def _open(self, start: Start, data_spec: DataSpec) -> Checkpoint | None:
        """The checkpoint to go on from; rank 0 has verified its bytes."""
        if start.checkpoint is None:
            return None
        saved = checkpoint.open_verified(start.checkpoint)
        names = [list(names) for names in self.plan.cut.modules]
        task, total = self.plan.task, total_steps(self.config, data_spec)
        resume.check_fits(saved, names, task.classes, task.image_shape, data_spec.train_batches, total)
        return saved

    def _make_stage(self) -> Stage:
        runtime, plan, config = self.runtime, self.plan, self.config
        edges = connect_stage(config, plan, self.numerics, runtime)
        self.recorder = tracing.attach(runtime, plan, edges) if self.trace else None
        make_stage = FreeStage if config.schedule.kind == "free" else Stage
        return make_stage(
            self.modules,
            plan.schedules[runtime.team.rank],
            plan.gradient_order(runtime.team.rank + 1) if runtime.team.rank + 1 < runtime.team.size else (),
            config.schedule.micro_batches,
            edges,
            plan.image_crosses(runtime.team.rank),
            runtime.desk.progress,
            self.before_action,
            self.recorder,
        )

    def _restore(self, saved: Checkpoint | None) -> tuple[Position, list[EpochRecord]]:
        if saved is None:
            return Position(), []
        for module in self.modules:
            state = saved.module_state(module.plan.index)
            restore_module(module, state)
            if BUSY in state:
                self.stage.counters.busy_s[module.plan.index] = float(state[BUSY])
        self.stage.restored()
        return Position.of(saved), resume.records_of(saved)

    def _start_view(self, start: Start, position: Position, data_spec: DataSpec) -> None:
        devices = self.runtime.team.gather(str(self.runtime.device))
        live = False
        if self.view is not None and devices is not None:
            for warning in start.warnings:
                print(f"localpipe warning: {warning}", file=sys.stderr, flush=True)
            header, *lines = describe(self.plan, self.numerics, devices)
            lines += [self._placement] if self._placement else []
            if start.checkpoint is not None:
                lines += [f"resumed from {start.checkpoint} (step {position.step})", *start.lines]
            if self.trace and self.draw and not tracing.can_draw():
                lines.append("--trace writes trace.json only; trace.png needs matplotlib: pip install localpipe[plot]")
            labels = [self.plan.cut.label(index) for index in range(len(self.plan.modules))]
            self.view.start(header, lines, labels)
            live = not self.quiet
        team = self.runtime.team
        self.telemetry = Telemetry(team, self.plan, self.runtime.device, team.broadcast(live))

    def _make_loop(
        self, start: Start, source: Source | None, data_spec: DataSpec, position: Position, records: list[EpochRecord]
    ) -> Loop:
        runtime, config = self.runtime, self.config
        folder = self.directory.path / checkpoint.FOLDER
        saver = Saver(runtime.team, folder, config.checkpoint)
        self.conductor = Conductor(config.checkpoint, runtime.desk.stop_request)
        run = Run(
            config=config,
            runtime=runtime,
            plan=self.plan,
            stage=self.stage,
            data_spec=data_spec,
            source=source,
            telemetry=self.telemetry,
            directory=self.directory,
            lock=self._lock,
            saver=saver,
            conductor=self.conductor,
            view=self.view,
            custom_network=self.network is not None,
        )
        loop = Loop(run, position, records, saved=start.checkpoint is not None and start.checkpoint.parent == folder)
        if self.leader:
            self.directory.begin_metrics(loop.records)
        return loop

    # --- the end ------------------------------------------------------------------------------------------------------

    def _asked_to_stop(self) -> str | None:
        """Which signal came to any rank while everything was being set up. Collective."""
        requests = self.runtime.team.gather(self.runtime.desk.stop_request())
        return self.runtime.team.broadcast(next((request for request in requests or () if request), None))

    def _stopped(self, reason: str, step: int, folder: Path | None) -> dict[str, Any]:
        """Say that a signal has ended the run early, in order."""
        if self.view is not None:
            self.view.close()
        if self.leader:
            when = f"after step {step}" if step else "before step 0"
            what = "nothing was trained" if folder is None else f"saved in {folder}"
            print(
                f"localpipe: stopped by {reason} {when}; {what}; goes on with --resume auto --run-dir "
                f"{self.directory.path}",
                flush=True,
            )
        return {
            "stopped": reason,
            "step": step,
            "checkpoint": None if folder is None else str(folder),
            "run_directory": str(self.directory.path),
        }

    def _finish(self) -> dict[str, Any]:
        """Collect weights and write the run directory; returns the summary on every rank."""
        states = {module.plan.index: module_weights(module) for module in self.modules}
        gathered = self.runtime.team.gather(states)
        summary: dict[str, Any] | None = None
        if gathered is not None and self.view is not None:
            every = {index: state for part in gathered for index, state in part.items()}
            ordered = [every[index] for index in range(len(self.plan.modules))]
            self.loop.keep_directory()
            write_weights(self.directory.path / MODEL, model_state(ordered))
            write_weights(self.directory.path / HEADS, heads_state(ordered))
            summary = summarise(self.loop.records, settings=self._settings(ordered))
            self.directory.write_summary(summary)
            self.view.finish(summary)
        return self.runtime.team.broadcast(summary)

    def _settings(self, states: list[State]) -> dict[str, Any]:
        config = self.config
        return {
            "name": config.model.name,
            "data": config.data.name,
            "method": config.method.name if len(self.plan.modules) > 1 else "bp",
            "cascade_span": config.hierarchy.cascade_span,
            "patches_grid": config.patches.grid,
            "schedule": config.schedule.kind,
            "micro_batches": config.schedule.micro_batches,
            "modules": len(self.plan.modules),
            "world_size": self.runtime.team.size,
            "seed": config.train.seed,
            "precision": str(self.numerics.dtype).removeprefix("torch."),
            "config_sha256": config.fingerprint(),
            "weights_sha256": weights_sha256(states),
            "run_directory": str(self.directory.path),
        }

    def _module_at_work(self) -> str | None:
        action = self.stage.current if self.stage is not None else None
        if action is None:
            return None
        return f"module {action.module} ({self.plan.cut.label(action.module)})"


def _unsaved(problem: str) -> str:
    return f"its last checkpoint was not saved: {problem}; older ones are untouched"
