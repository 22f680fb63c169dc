"""What ranks tell rank 0 while they train. It goes through the store, never through the edges of the pipeline.

    every rank:  post(epoch)  after an epoch           rank 0:  collect() when it has time, in order of epochs
                 pulse()      at most twice a second            live()    for the view
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.local.task import ERROR, Metric
from pipeline.plan.assembly import Plan
from pipeline.ranks.keys import Key
from pipeline.ranks.resources import peak_memory_bytes
from pipeline.ranks.team import Team
from pipeline.stage.counters import Counters
from pipeline.stage.stage import Stage
from pipeline.store.records import EpochRecord, LiveModule, ModuleRecord, StageRecord

PULSE_S = 0.5


@dataclasses.dataclass(frozen=True)
class StageReport:
    """One rank's share of an :class:`EpochRecord`, as JSON between ranks."""

    stage: dict[str, Any]
    modules: list[dict[str, Any]]
    images: int
    tested: int
    test_metrics: dict[str, float]
    test_loss_sum: float
    ema_metrics: dict[str, float]


class Telemetry:
    """The reporter of one rank; on rank 0 also the collector.

    Args:
        live: whether anybody watches between epochs.
    """

    def __init__(self, team: Team, plan: Plan, device: torch.device, live: bool) -> None:
        self._team = team
        self._plan = plan
        self._device = device
        self._live = live
        self._last_pulse = 0.0
        self._bytes_before = 0

    def pulse(self, stage: Stage, started: float) -> None:
        """Publish this stage's live numbers if the last ones are old. ``started``: when the epoch began (monotonic)."""
        now = time.monotonic()
        if not self._live or now - self._last_pulse < PULSE_S:
            return
        self._last_pulse = now
        wall = max(now - started, 1e-9)
        waited = stage.wait_since_epoch()
        counters = stage.counters
        modules = [
            LiveModule(
                index=index,
                rank=self._team.rank,
                losses=module.losses.means(),
                busy_fraction=stage.watch.busy_s.get(index, 0.0) / wall,
                wait_fraction=waited / wall,
                queue_depth=counters.queue_depth_sum / max(counters.queue_depth_count, 1),
                peak_memory_bytes=peak_memory_bytes(self._device),
            )
            for index, module in stage.modules.items()
        ]
        text = json.dumps([dataclasses.asdict(module) for module in modules])
        self._team.set(Key.PULSE(rank=self._team.rank), text)

    def live(self) -> tuple[LiveModule, ...]:
        """The latest live numbers of every rank that has published some (rank 0)."""
        keys = [key for key in self._team.each(Key.PULSE).values() if self._team.has(key)]
        return tuple(LiveModule(**entry) for text in self._team.get(keys) for entry in json.loads(text))

    def post(self, epoch: int, stage: Stage, counters: Counters, wait_s: float, wall_s: float, sent: int) -> None:
        """Publish this rank's numbers of a finished epoch. ``sent``: bytes sent since the run began."""
        index_of_last = len(self._plan.modules) - 1
        measured = {
            (index, level, metric.name): metric.of(counters.statistics[index, level, metric.name], counters.tested)
            for index, level, name in counters.statistics
            for metric in self._plan.task.metrics
            if metric.name == name
        }
        modules = []
        for index, module in stage.modules.items():
            errors: dict[str, float | None] = {}
            for level in [*module.levels, *(["final"] if module.plan.final else [])]:
                errors[level] = measured.get((index, level, ERROR.name))
            others = {
                f"{level}.{name}": value
                for (of, level, name), value in measured.items()
                if of == index and name != ERROR.name
            }
            module_record = ModuleRecord(
                index=index,
                rank=self._team.rank,
                blocks=self._plan.cut.label(index),
                losses=module.take_losses(),
                head_error_pct=errors,
                head_metrics=others,
                busy_s=counters.busy_s.get(index, 0.0),
                skipped_steps=module.losses.take_skipped(),
            )
            modules.append(dataclasses.asdict(module_record))
        record = StageRecord(
            rank=self._team.rank,
            device=str(self._device),
            modules=tuple(stage.modules),
            busy_s=sum(counters.busy_s.values()),
            wait_s=wait_s,
            wall_s=wall_s,
            queue_depth=counters.queue_depth_sum / max(counters.queue_depth_count, 1),
            peak_memory_bytes=peak_memory_bytes(self._device),
            bytes_sent=sent - self._bytes_before,
            steps=counters.steps,
            reused=counters.reused,
            skipped=counters.skipped,
            held_back=counters.held_back,
        )
        self._bytes_before = sent
        report = StageReport(
            stage=dataclasses.asdict(record),
            modules=modules,
            images=counters.images,
            tested=counters.tested,
            test_metrics={
                name: value for (*where, name), value in measured.items() if where == [index_of_last, "final"]
            },
            test_loss_sum=float(counters.test_loss_sum),
            ema_metrics=self._of_averages(counters.averaged),
        )
        self._team.set(Key.EPOCH(epoch=epoch, rank=self._team.rank), json.dumps(dataclasses.asdict(report)))

    def _of_averages(self, counters: Counters | None) -> dict[str, float]:
        """The metrics and the loss of the network's output with averaged weights, where this rank has tested it."""
        if counters is None or not counters.tested:
            return {}
        place = (len(self._plan.modules) - 1, "final")
        found = {
            metric.name: metric.of(counters.statistics[*place, metric.name], counters.tested)
            for metric in self._plan.task.metrics
            if (*place, metric.name) in counters.statistics
        }
        return found | {"loss": float(counters.test_loss_sum) / counters.tested} if found else {}

    def collect(self, epoch: int, wait: bool) -> list[StageReport] | None:
        """All ranks' reports of ``epoch`` (rank 0), or None if some are missing and ``wait`` is false. From any thread.

        Raises:
            DeadlineExceeded: with ``wait``, a rank does not report, and is not just slow.
        """
        keys = self._team.each(Key.EPOCH, epoch=epoch)
        if not wait and not self._team.has(*keys.values()):
            return None
        self._team.wait_for(keys, f"report epoch {epoch}")
        return [StageReport(**json.loads(text)) for text in self._team.take(keys.values())]


def merge(
    reports: list[StageReport], metrics: Sequence[Metric], *, epoch: int, epochs: int, step: int, learning_rate: float
) -> EpochRecord:
    """One record of the whole pipeline from the reports of all ranks, in order of ranks."""
    last = reports[-1]
    modules = tuple(ModuleRecord(**entry) for report in reports for entry in report.modules)
    stages = tuple(StageRecord(**{**r.stage, "modules": tuple(r.stage["modules"])}) for r in reports)
    wall_s = max(stage.wall_s for stage in stages)
    images = reports[0].images
    tested = last.tested
    return EpochRecord(
        epoch=epoch,
        epochs=epochs,
        step=step,
        images=images,
        wall_s=wall_s,
        images_per_s=images / wall_s if wall_s > 0 else 0.0,
        learning_rate=learning_rate,
        train_loss=modules[-1].losses.get("final", float("nan")),
        test_error_pct=last.test_metrics.get(ERROR.name),
        test_loss=last.test_loss_sum / tested if tested else None,
        stages=stages,
        modules=modules,
        test_metrics={name: value for name, value in last.test_metrics.items() if name != ERROR.name},
        test_text=f"{metrics[0].title} {metrics[0].form.text(last.test_metrics.get(metrics[0].name))}",
        metric=metrics[0].form,
        ema_metrics=last.ema_metrics,
    )
