"""The whole run on one rank: agree, build, train, test, report, save.

    config, data facts -> Plan -> Stage + edges -> [epoch: train steps, test steps, post numbers] -> weights, summary

Every rank runs the same code; only the first stage reads images and only rank 0 writes files and the screen.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import tracing
from pipeline.assembly import build_modules, describe
from pipeline.backbones import Blocks, blocks_of, build_blocks
from pipeline.compilation import refuse_without_compiler
from pipeline.config import Config, to_toml, validate
from pipeline.connect import Edges, EdgeSpecs, agree, connect
from pipeline.errors import ConfigError, LocalpipeError
from pipeline.free_stage import FreeStage
from pipeline.methods import Task
from pipeline.numerics import Numerics, resolve_numerics
from pipeline.optimiser import learning_rate
from pipeline.partition import cut, given, place
from pipeline.placement import placed_plan, write_plan
from pipeline.report import EpochRecord, Progress, RunDirectory, open_view, summarise
from pipeline.runtime import Runtime
from pipeline.schedule import Action
from pipeline.sources import Facts, ImageSource, LoaderData, LoaderSource, Source
from pipeline.stage import Batch, Stage
from pipeline.telemetry import Telemetry, merge
from pipeline.version import VERSION
from pipeline.weights import merged_state, weights_sha256

ActionHook = Callable[[int, Action], None]


def train(
    config: Config,
    *,
    network: nn.Sequential | None = None,
    data: LoaderData | None = None,
    run_dir: Path | str | None = None,
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
        run_dir: where config.toml, metrics.jsonl, summary.json, model.pt, heads.pt go; default ``runs/<name>-<time>``.
        quiet: print only the final report.
        before_action: called with (step, action) before every action of this rank's schedule.
        trace: write what every rank did when: trace.json (Chrome, Perfetto) and, with matplotlib, trace.png.
        draw: whether ``trace`` draws the picture; it takes a second.

    Returns:
        The contents of summary.json, on every rank.

    A failure on any rank ends all processes with one line (see :class:`pipeline.failure.FailureDesk`).
    """
    settings = config.runtime
    with Runtime(settings.device, settings.threads, settings.deadline_s) as runtime:
        run = _Run(config, runtime, network, data, quiet, before_action, trace, draw)
        return run.run(Path(run_dir) if run_dir is not None else None)


SHOW_S = 0.25
"""Between two looks at the other ranks' live numbers: asking for them takes longer, the more ranks there are."""


class _Run:
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
        self.config = _named_after(validate(config), network, data)
        self.network = network
        self.data = data
        self.quiet = quiet
        self.before_action = before_action
        self.trace = trace
        self.draw = draw
        self.leader = runtime.rank == 0
        self.records: list[EpochRecord] = []
        self._posted = 0
        self._last_shown = 0.0

    def run(self, run_dir: Path | None) -> dict[str, Any]:
        """Everything, in order; the cheap refusals first."""
        runtime, config, settings = self.runtime, self.config, self.config.runtime
        self.numerics = self._refuse_early()
        agree(runtime.store, runtime.rank, runtime.world_size, "the version", VERSION, config.runtime.deadline_s)
        agree(
            runtime.store,
            runtime.rank,
            runtime.world_size,
            "the configuration (hash)",
            config.fingerprint(),
            config.runtime.deadline_s,
        )
        agree(  # no part of the fingerprint, since it never changes a result; but all ranks must cut alike
            runtime.store, runtime.rank, runtime.world_size, "partition.*", str(config.partition), settings.deadline_s
        )
        self.directory = self._make_directory(run_dir)
        self.source, facts = self._open_data()
        blocks, task = self._blocks(facts)
        self.plan, self._placement = placed_plan(config, blocks, task, self.numerics, runtime)
        if self.leader:
            write_plan(self.plan, self.directory.path / "plan.json")
        runtime.desk.describe(self.plan.stage_label(runtime.rank))
        self.modules = build_modules(
            self.plan, runtime.rank, blocks, self.numerics, fresh=self.network is None
        )
        del blocks  # the other stages' blocks
        self.edges = self._connect()
        self.recorder = tracing.attach(runtime, self.plan, self.edges) if self.trace else None
        make_stage = FreeStage if config.schedule.kind == "free" else Stage
        self.stage = make_stage(
            self.modules,
            self.plan.schedules[runtime.rank],
            self.plan.gradient_order(runtime.rank + 1) if runtime.rank + 1 < runtime.world_size else (),
            config.schedule.micro_batches,
            self.edges,
            self.plan.image_crosses(runtime.rank),
            runtime.desk.progress,
            self.before_action,
            self.recorder,
        )
        self.view = open_view(quiet=self.quiet) if self.leader else None
        if self.view is not None:
            runtime.desk.before_exit = self.view.close  # a live view hides the cursor
        try:
            self._start_view()
            self._epochs(facts)
            self.edges.close()
            summary = self._finish()
            if self.recorder is not None:
                steps = min(self._steps_of_epoch, self.total_steps)
                for note in tracing.write(runtime, self.recorder, self.plan, self.directory.path, steps, self.draw):
                    print(note)
            return summary
        except (LocalpipeError, KeyboardInterrupt):
            raise
        except Exception as error:
            runtime.desk.report(error, self._module_at_work())
        finally:
            if self.view is not None:
                self.view.close()

    # --- before step 0 ------------------------------------------------------------------------------------------------

    def _refuse_early(self) -> Numerics:
        """Refusals that need no data: more modules than blocks, more ranks than modules, a layout that cannot work."""
        blocks = blocks_of(self.network) if self.network is not None else build_blocks(self.config.model.name, 3, 10)
        count = len(cut(list(blocks), self.config.model))
        if self.config.partition.kind == "given":
            given(self.config.partition.stages, count, self.runtime.world_size)
        place(count, self.runtime.world_size)
        if self.config.precision.compile:
            refuse_without_compiler(self.runtime.device)
        return resolve_numerics(self.config.precision, self.runtime.device, blocks.values())

    def _make_directory(self, run_dir: Path | None) -> RunDirectory:
        path = None
        if self.leader:
            directory = RunDirectory.create(run_dir, f"{self.config.model.name}-{self.config.data.name}")
            directory.write_config(to_toml(self.config))
            path = str(directory.path)
        path = self.runtime.broadcast(path)
        self.runtime.desk.run_dir = Path(path)
        return RunDirectory(Path(path))

    def _open_data(self) -> tuple[Source | None, Facts]:
        source: Source | None = None
        if self.leader:
            if self.data is not None:
                source = LoaderSource(self.data, self.config, self.numerics)
            else:
                source = ImageSource(self.config, self.numerics)
        return source, self.runtime.broadcast(source.facts if source is not None else None)

    def _blocks(self, facts: Facts) -> tuple[Blocks, Task]:
        if self.network is None:
            if facts.classes == 0:
                raise ConfigError("your own loaders need your own network: pass network=nn.Sequential(...)")
            blocks = build_blocks(self.config.model.name, facts.image_shape[0], facts.classes)
            return blocks, Task(facts.classes, facts.image_shape)
        blocks = blocks_of(self.network)
        classes = facts.classes or _classes_of(blocks)
        return blocks, Task(classes, facts.image_shape)

    def _connect(self) -> Edges:
        runtime, plan = self.runtime, self.plan
        if runtime.store is None:
            return Edges()
        rank, last = runtime.rank, runtime.world_size - 1
        wire = (self.numerics.dtype, self.numerics.channels_last)

        def gradients(sender: int) -> Any:
            return plan.gradient_spec(sender, *wire) if plan.gradient_order(sender) else None

        specs = EdgeSpecs(
            activation_in=plan.activation_spec(rank - 1, *wire) if rank > 0 else None,
            activation_out=plan.activation_spec(rank, *wire) if rank < last else None,
            gradient_in=gradients(rank + 1) if rank < last else None,
            gradient_out=gradients(rank) if rank > 0 else None,
        )
        settings = self.config.runtime
        return connect(
            runtime.store,
            rank,
            runtime.world_size,
            specs,
            slots=settings.queue_depth + plan.messages_held(),
            depth=settings.queue_depth,
            deadline_s=settings.deadline_s,
            device=runtime.device,
            backend=runtime.backend,
            ring=self.config.schedule.ring if self.config.schedule.kind == "free" else 0,
            max_uses=self.config.schedule.max_uses,
        )

    def _start_view(self) -> None:
        devices = self.runtime.gather(str(self.runtime.device))
        live = False
        if self.view is not None and devices is not None:
            header, *lines = describe(self.plan, self.numerics, devices)
            lines += [self._placement] if self._placement else []
            if self.trace and self.draw and not tracing.can_draw():
                lines.append("--trace writes trace.json only; trace.png needs matplotlib: pip install localpipe[plot]")
            labels = [self.plan.partition.label(index) for index in range(len(self.plan.modules))]
            self.view.start(header, lines, labels)
            live = not self.quiet
        self.telemetry = Telemetry(
            self.runtime.store,
            self.runtime.rank,
            self.plan,
            self.runtime.device,
            self.runtime.broadcast(live),
            self.config.runtime.deadline_s,
        )

    # --- training -----------------------------------------------------------------------------------------------------

    def _epochs(self, facts: Facts) -> None:
        settings = self.config.train
        total = settings.epochs * facts.train_batches
        if settings.max_steps:
            total = min(total, settings.max_steps)
        epochs = -(-total // facts.train_batches)
        self.total_steps, self.run_epochs, self._steps_of_epoch = total, epochs, facts.train_batches
        self._began = time.monotonic()
        step = 0
        for epoch in range(1, epochs + 1):
            rate = learning_rate(self.config.optim, epoch, settings.epochs)
            for module in self.modules:
                module.set_learning_rate(rate)
            steps = min(facts.train_batches, total - step)
            started = time.monotonic()
            self._train_epoch(epoch, step, steps, facts, started)
            step += steps
            if self.runtime.device.type == "cuda":  # the only time that an epoch waits for the device
                torch.cuda.synchronize()
            wall_s, wait_s = time.monotonic() - started, self.stage.wait_since_epoch()
            if epoch % settings.evaluate_every == 0 or epoch == epochs:
                self._test(epoch, step, facts)
            sent = sum(sender.bytes_sent for sender in self.stage.senders())
            self._posted = epoch
            self.telemetry.post(epoch, self.stage, self.stage.take_counters(), wait_s, wall_s, sent)
            if self.leader:
                self._record(wait=epoch == epochs)

    def _train_epoch(self, epoch: int, first_step: int, steps: int, facts: Facts, started: float) -> None:
        batches = self.source.train(epoch) if self.source is not None else None
        self.stage.begin_epoch(first_step)
        try:
            index = 0
            while self.stage.more_steps(epoch, index, steps):
                batch: Batch | None = None
                if batches is not None:
                    batch = self.stage.fetch(batches, f"epoch {epoch}")
                self.stage.train_step(epoch, first_step + index, batch)
                self.telemetry.pulse(self.stage, started)
                index += 1
                if self.view is not None and time.monotonic() - self._last_shown > SHOW_S:
                    self._show(epoch, first_step, index, steps, facts, started)
            self.stage.end_epoch(epoch, first_step + steps)
        finally:
            close = getattr(batches, "close", None)  # ends the loader's thread when an epoch is cut short
            if close is not None:
                close()

    def _test(self, epoch: int, step: int, facts: Facts) -> None:
        batches = self.source.test() if self.source is not None else None
        for index in range(facts.test_batches):
            batch = self.stage.fetch(batches, "the test") if batches is not None else None
            self.stage.test_step(epoch, step + index, batch)

    def _show(self, epoch: int, first_step: int, done: int, steps: int, facts: Facts, started: float) -> None:
        assert self.view is not None
        now = self._last_shown = time.monotonic()
        self._record(wait=False)
        images = done * facts.train_images / facts.train_batches
        finished = first_step + done
        self.view.progress(
            Progress(
                epoch=epoch,
                epochs=self.run_epochs,
                batch=done,
                batches=steps,
                images_per_s=images / max(now - started, 1e-9),
                eta_s=(now - self._began) / finished * (self.total_steps - finished),
                phase="train",
                modules=self.telemetry.live(),
            )
        )

    def _record(self, wait: bool) -> None:
        """Write and show every epoch that all ranks have reported; with ``wait``, all that are left."""
        while len(self.records) < self._posted:
            epoch = len(self.records) + 1
            reports = self.telemetry.collect(epoch, wait)
            if reports is None:
                return
            record = merge(
                reports,
                epoch=epoch,
                epochs=self.run_epochs,
                step=min(epoch * self._steps_of_epoch, self.total_steps),
                learning_rate=learning_rate(self.config.optim, epoch, self.config.train.epochs),
            )
            self.records.append(record)
            self.directory.append(record)
            if self.view is not None:
                self.view.epoch(record)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        """Collect weights and write the run directory; returns the summary on every rank."""
        states = {module.plan.index: module.state() for module in self.modules}
        gathered = self.runtime.gather(states)
        summary: dict[str, Any] | None = None
        if gathered is not None and self.view is not None:
            every = {index: state for part in gathered for index, state in part.items()}
            ordered = [every[index] for index in range(len(self.plan.modules))]
            self.directory.write_state("model", merged_state(ordered, "blocks"))
            self.directory.write_state("heads", merged_state(ordered, "heads"))
            summary = summarise(self.records, settings=self._settings(ordered))
            self.directory.write_summary(summary)
            self.view.finish(summary)
        return self.runtime.broadcast(summary)

    def _settings(self, states: list[dict[str, dict[str, Tensor]]]) -> dict[str, Any]:
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
            "world_size": self.runtime.world_size,
            "seed": config.train.seed,
            "precision": str(self.numerics.dtype).removeprefix("torch."),
            "config_sha256": config.fingerprint(),
            "weights_sha256": weights_sha256(states),
            "run_directory": str(self.directory.path),
        }

    def _module_at_work(self) -> str | None:
        action = self.stage.current
        if action is None:
            return None
        return f"module {action.module} ({self.plan.partition.label(action.module)})"


def _classes_of(blocks: Blocks) -> int:
    """Outputs of the last linear layer of a user's network."""
    linear = [m for block in blocks.values() for m in block.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError("the network has no linear layer at its end, so its number of classes is unknown; add one")
    return linear[-1].out_features


def _named_after(config: Config, network: nn.Sequential | None, data: LoaderData | None) -> Config:
    """The configuration with the names and the batch size of a user's own network and loaders."""
    if network is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name="custom"))
    if data is not None:
        batch = getattr(data.train, "batch_size", None) or config.data.batch_size
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name="loader", batch_size=batch))
    return validate(config)
