"""The epochs of one rank: train, test, report, save; and stop after a common step when asked to.

    epoch e   step step step ... | late work | test | report | save
                  ^ save, or save and leave: the first stage decides, its directive travels with the batch

Every stage saves after the same step, so what they save belongs together: nothing that another stage has seen is
missing, and nothing that is on its way is lost (see Stage.catch_up).
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.base.config import Config
from pipeline.base.errors import warn
from pipeline.base.toml import to_toml
from pipeline.base.version import VERSION
from pipeline.data.share import Share
from pipeline.data.source import DataSpec
from pipeline.edges.connect import Edges
from pipeline.edges.wire import Directive
from pipeline.local.late_parts import own_part
from pipeline.local.module_state import BUSY, module_state
from pipeline.local.optimiser import learning_rate, poly
from pipeline.local.task import Classification, task_name
from pipeline.local.to_host import arrival
from pipeline.plan.assembly import Plan, write_plan
from pipeline.ranks.grid import Grid
from pipeline.ranks.runtime import Runtime
from pipeline.report.loggers import Loggers
from pipeline.report.view import View
from pipeline.run.orders import SaveOrStop
from pipeline.run.telemetry import Telemetry, merge
from pipeline.stage.stage import Stage
from pipeline.store.records import EpochProgress, EpochRecord
from pipeline.store.resume import Position
from pipeline.store.run_directory import PLAN, RunDirectory, json_ready
from pipeline.store.run_lock import RunLock
from pipeline.store.saver import Document, Saver

SHOW_S = 0.25
"""Between two looks at what there is to show. The other ranks' live numbers are asked for only where it will be shown:
that takes longer, the more ranks there are."""


@dataclass(frozen=True)
class Run:
    """What the loop works with; ``directory``, ``lock``, ``view`` and ``loggers`` are used on rank 0 only."""

    config: Config
    runtime: Runtime
    grid: Grid
    plan: Plan
    stage: Stage
    edges: Edges
    data_spec: DataSpec
    telemetry: Telemetry
    directory: RunDirectory
    lock: RunLock | None
    saver: Saver
    orders: SaveOrStop
    view: View | None
    loggers: Loggers
    custom_network: bool


def total_steps(config: Config, data_spec: DataSpec) -> int:
    """Training steps of the whole run."""
    total = config.train.epochs * data_spec.train_batches
    return min(total, config.train.max_steps) if config.train.max_steps else total


def saves_parts(plan: Plan) -> bool:
    """Whether batches in flight between two steps are known to their replica only."""
    return plan.replicas > 1 and any(action.lag for schedule in plan.schedules for action in schedule)


class Loop:
    """Runs from ``start`` to the end. ``records`` are those of the epochs before it (rank 0); ``saved``: the run has a
    checkpoint of ``start``."""

    def __init__(self, run: Run, start: Position, records: list[EpochRecord], saved: bool) -> None:
        self._run = run
        self._start = start
        self.total = total_steps(run.config, run.data_spec)
        self.epochs = -(-self.total // run.data_spec.train_batches)
        self.step = start.step
        self._finished = min(start.finished_epochs, self._epoch_at_work() - 1)
        self.records = records[: self._finished]
        self._saved = (start.step, start.finished_epochs) if saved else None
        self._told_of_directory = False  # that it was gone, which is said once
        self._unwritten = False  # whether metrics.jsonl lacks a record
        self._record_lock = threading.RLock()  # the saver's thread collects records as well
        self._last_shown = 0.0
        self._learning_rate: float | None = None  # that the modules have
        self._began = time.monotonic()

    def run(self) -> Directive:
        """Train to the end, or until told to stop: GO or STOP. After STOP the state is saved."""
        run, settings = self._run, self._run.config.train
        leader = run.runtime.team.leads
        for epoch in range(self._epoch_at_work(), self.epochs + 1):
            first = (epoch - 1) * run.data_spec.train_batches
            end = min(first + run.data_spec.train_batches, self.total)
            self._set_learning_rate(epoch, max(self.step - 1, 0))
            for module in run.stage.modules.values():
                module.set_level_weights(epoch, settings.epochs)
            self._epoch_began = time.monotonic() - self._start_of_epoch(first)
            late = self.step == self._start.step > self._start.late_since
            directive = self._train(epoch, first, end) if self.step < end or late else Directive.GO
            if self.step < end:
                self._save(epoch, run.stage.late_since(self.step))
                return Directive.STOP
            if run.runtime.device.type == "cuda":  # the only time that an epoch waits for its own work
                torch.cuda.current_stream().synchronize()  # not for the device: a message may be under way
            wall_s, wait_s = time.monotonic() - self._epoch_began, run.stage.wait_since_epoch()
            if directive is not Directive.STOP and (epoch % settings.evaluate_every == 0 or epoch == self.epochs):
                directive = max(directive, self._test(epoch))
            if directive is Directive.STOP:
                self._save(epoch, self.step)
                return Directive.STOP
            sent = run.edges.bytes_sent() + run.stage.bytes_averaged()
            self._finished = epoch
            run.telemetry.post(epoch, run.stage, run.stage.take_counters(), wait_s, wall_s, sent)
            if directive is Directive.SAVE or self._due(epoch):
                self._save(epoch, self.step)
            if leader:
                self._record(epoch, wait=epoch == self.epochs)
        return Directive.GO

    def finish(self) -> str | None:
        """Wait for the last save; why it failed, None if it did not. Collective."""
        self._run.runtime.failures.progress(self.epochs, self.step, "waiting for its last checkpoint")
        self._run.saver.join()
        self._warn()
        return self._run.runtime.team.broadcast(self._run.saver.error())

    # --- an epoch -----------------------------------------------------------------------------------------------------

    def _epoch_at_work(self) -> int:
        """The epoch whose training, test or report comes next; one more than there are if there is none."""
        batches = self._run.data_spec.train_batches
        if self.step >= self.total:
            return self.epochs + (self._start.finished_epochs >= self.epochs)
        trained, inside = divmod(self.step, batches)
        pending = trained > 0 and not inside and self._start.finished_epochs < trained
        return trained if pending else trained + 1

    def _start_of_epoch(self, first: int) -> float:
        """Take on the counts of an epoch that a checkpoint was made in; returns the seconds that it had taken."""
        start, counters = self._start, self._run.stage.counters
        if not first < self.step or self.step != start.step:
            return 0.0
        counters.images, counters.steps = start.images, self.step - first
        return start.wall_s

    def _train(self, epoch: int, first: int, end: int) -> Directive:
        """Train ``epoch`` up to step ``end``, unless told to stop. Returns the last directive."""
        run, stage = self._run, self._run.stage
        began = self.step
        stage.begin_epoch(self._start.late_since if first < began == self._start.step else first, began)
        with closing(stage.inlet.steps(epoch, first, began, end)) as steps:
            for step in steps:
                self._set_learning_rate(epoch, step)
                stage.train_step(epoch, step)
                if run.grid.leads:
                    run.telemetry.pulse(stage, self._epoch_began)
                if run.view is not None and time.monotonic() - self._last_shown > SHOW_S:
                    self._show(epoch, step + 1, first, end)
                if stage.directive is not Directive.GO and step + 1 < end:
                    self.step = step + 1
                    stage.catch_up(epoch, step)
                    if stage.directive is Directive.STOP:
                        return Directive.STOP
                    self._save(epoch, stage.late_since(self.step))
        self.step = stage.end_epoch(epoch, end)
        return stage.directive

    def _rate(self, epoch: int, step: int) -> float:
        """The learning rate of a step of ``epoch``."""
        optim = self._run.config.optim
        if optim.schedule == "poly":  # the steps of a stage of `free` may be more than those of the first one
            return poly(optim, min(step, self.total), self.total)
        return learning_rate(optim, epoch, self._run.config.train.epochs)

    def _set_learning_rate(self, epoch: int, step: int) -> None:
        """Of all modules from now on."""
        rate = self._rate(epoch, step)
        if rate != self._learning_rate:
            self._learning_rate = rate
            for module in self._run.stage.modules.values():
                module.set_learning_rate(rate)

    def _test(self, epoch: int) -> Directive:
        stage = self._run.stage
        mine = Share(self._run.grid.replica, self._run.grid.replicas).batches(self._run.data_spec.test_batches)
        stage.test(epoch, self.step, len(mine))
        if self._run.config.train.ema and stage.directive is not Directive.STOP:
            stage.test_averages(epoch, self.step, len(mine))
        return Directive.STOP if stage.directive is Directive.STOP else Directive.GO

    # --- saving -------------------------------------------------------------------------------------------------------

    def _due(self, epoch: int) -> bool:
        """Whether the settings ask for a checkpoint at the end of ``epoch``; any that asks for some gets the last."""
        settings = self._run.config.checkpoint
        if epoch == self.epochs:
            return bool(settings.every_epochs or settings.every_steps or settings.every_minutes)
        return settings.every_epochs > 0 and epoch % settings.every_epochs == 0

    def _save(self, epoch: int, late_since: int) -> None:
        """Copy the state between two steps and leave the writing to the saver."""
        run, stage = self._run, self._run.stage
        if self._saved == (self.step, self._finished):
            return
        self._saved = (self.step, self._finished)
        if not run.grid.leads and not saves_parts(run.plan):
            return  # its twin in the first replica has the same state
        run.runtime.failures.progress(epoch, self.step, "saving")
        states = {index: module_state(module) for index, module in stage.modules.items()}
        if not run.grid.leads:
            late = {index: states[index] for index, module in stage.modules.items() if module.stashes is not None}
            parts = {index: own_part(state) for index, state in late.items()}
            run.saver.save(self.step, parts, None, arrival(run.runtime.device))
            return
        for index, busy_s in stage.watch.busy_s.items():
            states[index][BUSY] = torch.tensor(busy_s, dtype=torch.float64)
        document = None
        if run.runtime.team.leads:
            with contextlib.suppress(OSError):  # the save will say so
                self.keep_directory()
            inside = self._finished < epoch
            position = Position(
                self.step,
                self._finished,
                late_since,
                stage.counters.images if inside else 0,
                time.monotonic() - self._epoch_began if inside else 0.0,
            )
            document = self._document(epoch, position)
            run.orders.saved()
        run.saver.save(self.step, states, document, arrival(run.runtime.device))
        self._warn()

    def _document(self, epoch: int, position: Position) -> Document:
        run, plan = self._run, self._run.plan

        def contents() -> tuple[dict[str, Any], list[dict[str, Any]]]:
            self.keep_directory()
            self._record(position.finished_epochs, wait=True)  # all ranks have reported before they have saved
            records = self.records[: position.finished_epochs]
            tested = records[-1].test_error_pct if records and position.finished_epochs == epoch else None
            manifest = {
                "localpipe": VERSION,
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "date": time.strftime("%Y-%m-%d %H:%M:%S"),
                "epoch": epoch,
                **dataclasses.asdict(position),
                "total_steps": self.total,
                "train_batches": run.data_spec.train_batches,
                "modules": [list(names) for names in plan.cut.modules],
                "classes": plan.task.classes,
                "image_shape": list(plan.task.image_shape),
                "custom_network": run.custom_network,
                "config_sha256": run.config.fingerprint(),
                "test_error_pct": tested,
                **self._chosen_levels(),
                **self._of_another_task(records[-1] if records and position.finished_epochs == epoch else None),
            }
            return manifest, [dataclasses.asdict(record) for record in records]

        return Document(to_toml(run.config), contents)

    def _chosen_levels(self) -> dict[str, Any]:
        """What the plan has chosen, so that a resume on as many ranks does the same."""
        plan = self._run.plan
        if plan.config.hierarchy.levels != "auto":
            return {}
        return {"levels_together": {"ranks": len(plan.stages), "modules": list(plan.levels_together)}}

    def _of_another_task(self, tested: EpochRecord | None) -> dict[str, Any]:
        """What the manifest of a task other than classification says besides."""
        task = self._run.plan.task
        if type(task) is Classification:
            return {}
        value = tested.measured if tested is not None else None
        return {"task": task_name(task), "test_cost": task.metrics[0].cost(value)}

    # --- reporting ----------------------------------------------------------------------------------------------------

    def _show(self, epoch: int, step: int, first: int, end: int) -> None:
        run = self._run
        assert run.view is not None
        now = self._last_shown = time.monotonic()
        self._record(self._finished, wait=False)
        self._warn()
        if not run.view.due(epoch, step - first, end - first):
            return
        images = (step - first) * run.data_spec.train_images / run.data_spec.train_batches
        run.view.progress(
            EpochProgress(
                epoch=epoch,
                epochs=self.epochs,
                batch=step - first,
                batches=end - first,
                images_per_s=images / max(now - self._epoch_began, 1e-9),
                eta_s=(now - self._began) / (step - self._start.step) * (self.total - step),
                phase="train",
                modules=run.telemetry.live(),
                loader_images_per_s=_times(run.telemetry.loader_images_per_s, run.grid.replicas),
            )
        )

    def _record(self, through: int, wait: bool) -> None:
        """Write and show every epoch up to ``through`` that all ranks have reported; with ``wait``, all of them."""
        run = self._run
        with self._record_lock:
            while len(self.records) < through:
                epoch = len(self.records) + 1
                reports = run.telemetry.collect(epoch, wait)
                if reports is None:
                    return
                step = min(epoch * run.data_spec.train_batches, self.total)
                record = merge(
                    reports,
                    run.plan.task.metrics,
                    epoch=epoch,
                    epochs=self.epochs,
                    step=step,
                    learning_rate=self._rate(epoch, step - 1),
                    stages=run.grid.stages,
                )
                self.records.append(record)
                self._write(record)
                if run.view is not None:
                    run.view.epoch(record)

    def _write(self, record: EpochRecord) -> None:
        """Add a line to metrics.jsonl; a full disk costs no run, and the line is made up for later. The same line goes
        to the loggers."""
        anew = False
        try:
            anew = self.keep_directory()
            if anew or self._unwritten:
                self._run.directory.begin_metrics(self.records)
            else:
                self._run.directory.append(record)
            self._unwritten = False
        except OSError as error:
            self._unwritten = True
            warn(f"metrics.jsonl was not written: {error}")
        if not anew:  # else they have begun with it
            self._run.loggers.record(json_ready(dataclasses.asdict(record)))

    def begin_loggers(self) -> None:
        """Rank 0: open the loggers, with the records so far."""
        self._run.loggers.begin([json_ready(dataclasses.asdict(record)) for record in self.records])

    def keep_directory(self) -> bool:
        """Rank 0: where the run directory has been deleted or renamed, go on in a new one with everything in it.
        Returns whether that was so.

        Raises:
            LocalpipeError: another job has begun in its place.
            OSError: the disk refuses.
        """
        run = self._run
        with self._record_lock:
            if run.lock is None or not run.lock.lost():
                return False
            run.lock.renew()
            run.directory.write_config(to_toml(run.config))
            write_plan(run.plan, run.directory.path / PLAN)
            run.directory.begin_metrics(self.records)
            self.begin_loggers()
            told, self._told_of_directory = self._told_of_directory, True
        if told:  # a deletion that takes its time meets a directory that is made anew
            return True
        warn(
            f"run directory '{run.directory.path}' was deleted or renamed; the run goes on in a new one with its "
            "configuration, plan and metrics so far; the next checkpoint is complete"
        )
        return True

    def _warn(self) -> None:
        for note in self._run.saver.take_notes():
            warn(note)


def _times(rate: float | None, replicas: int) -> float | None:
    """Of all replicas, whose loaders are alike."""
    return None if rate is None else rate * replicas
