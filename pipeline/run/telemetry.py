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
from torch import Tensor

from pipeline.data.rate import LoaderRate
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
    statistics: list[tuple[int, str, str, str, Any]]
    """module, level, metric, and what that has counted: the dtype, and (nested lists of) numbers"""
    test_loss_sum: float
    averaged: dict[str, Any]
    """``tested``, ``statistics`` and ``test_loss_sum`` of a test with the averages of all weights; empty without"""
    loader_images_per_s: float | None = None


class Telemetry:
    """The reporter of one rank; on rank 0 also the collector.

    Args:
        live: whether anybody watches between epochs.
        rate: of the loader, on the first stage.
    """

    def __init__(
        self, team: Team, plan: Plan, device: torch.device, live: bool, rate: LoaderRate | None = None
    ) -> None:
        self._rate = rate
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

    @property
    def loader_images_per_s(self) -> float | None:
        """What the loader of this rank could give in the epoch at work; None where there is none, or nobody knows."""
        return self._rate.images_per_s if self._rate is not None else None

    def post(self, epoch: int, stage: Stage, counters: Counters, wait_s: float, wall_s: float, sent: int) -> None:
        """Publish this rank's numbers of a finished epoch. ``sent``: bytes sent since the run began."""
        modules = []
        for index, module in stage.modules.items():
            levels = [*module.levels, *(["final"] if module.plan.final else [])]
            module_record = ModuleRecord(
                index=index,
                rank=self._team.rank,
                blocks=self._plan.cut.label(index),
                losses=module.take_losses(),
                head_error_pct=dict.fromkeys(levels),
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
            **_tested(counters),
            averaged={} if counters.averaged is None else _tested(counters.averaged),
            loader_images_per_s=self.loader_images_per_s,
        )
        self._team.set(Key.EPOCH(epoch=epoch, rank=self._team.rank), json.dumps(dataclasses.asdict(report)))

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
    reports: list[StageReport],
    metrics: Sequence[Metric],
    *,
    epoch: int,
    epochs: int,
    step: int,
    learning_rate: float,
    stages: int | None = None,
) -> EpochRecord:
    """One record of the whole job from the reports of all ranks, in order of ranks.

    Args:
        stages: ranks of a replica. Losses are the same in all of them; of a test each has done its part. None: all.
    """
    stages = len(reports) if stages is None else stages
    first, lasts = reports[:stages], reports[stages - 1 :: stages]
    tested = sum(last.tested for last in lasts)
    measured = _measured([report.statistics for report in reports], metrics, tested)
    modules = tuple(
        dataclasses.replace(
            module,
            head_error_pct={level: measured.get((module.index, level, ERROR.name)) for level in module.head_error_pct},
            head_metrics={
                f"{level}.{name}": value
                for (index, level, name), value in measured.items()
                if index == module.index and name != ERROR.name
            },
        )
        for module in (ModuleRecord(**entry) for report in first for entry in report.modules)
    )
    records = tuple(StageRecord(**{**r.stage, "modules": tuple(r.stage["modules"])}) for r in reports)
    wall_s = max(record.wall_s for record in records)
    images = reports[0].images
    of_network = {
        name: value for (index, level, name), value in measured.items() if (index, level) == (len(modules) - 1, "final")
    }
    return EpochRecord(
        epoch=epoch,
        epochs=epochs,
        step=step,
        images=images,
        wall_s=wall_s,
        images_per_s=images / wall_s if wall_s > 0 else 0.0,
        learning_rate=learning_rate,
        train_loss=modules[-1].losses.get("final", float("nan")),
        test_error_pct=of_network.get(ERROR.name),
        test_loss=sum(last.test_loss_sum for last in lasts) / tested if tested else None,
        stages=records,
        modules=modules,
        test_metrics={name: value for name, value in of_network.items() if name != ERROR.name},
        test_text=f"{metrics[0].title} {metrics[0].form.text(of_network.get(metrics[0].name))}",
        metric=metrics[0].form,
        loader_images_per_s=_all_of([report.loader_images_per_s for report in reports[::stages]]),
        ema_metrics=_of_averages([last.averaged for last in lasts if last.averaged], metrics, len(modules) - 1),
    )


def _tested(counters: Counters) -> dict[str, Any]:
    """What a rank has counted in a test, in the fields of a StageReport."""
    statistics = [
        (*key, str(counted.dtype).removeprefix("torch."), counted.tolist())
        for key, counted in counters.statistics.items()
    ]
    return {
        "tested": counters.tested, "statistics": statistics, "test_loss_sum": float(counters.test_loss_sum)
    }  # fmt: skip


def _of_averages(tests: Sequence[dict[str, Any]], metrics: Sequence[Metric], module: int) -> dict[str, float]:
    """Metrics and loss of the network's output, that of local module ``module``, in the tests of averaged weights."""
    tested = sum(test["tested"] for test in tests)
    if not tested:
        return {}
    measured = _measured([test["statistics"] for test in tests], metrics, tested)
    found = {name: value for (index, level, name), value in measured.items() if (index, level) == (module, "final")}
    return found | {"loss": sum(test["test_loss_sum"] for test in tests) / tested}


def _all_of(rates: Sequence[float | None]) -> float | None:
    """The loaders of all replicas together."""
    known = [rate for rate in rates if rate is not None]
    return sum(known) if len(known) == len(rates) else None


def _measured(
    ranks: Sequence[list[tuple[int, str, str, str, Any]]], metrics: Sequence[Metric], tested: int
) -> dict[tuple[int, str, str], float]:
    """Of every metric that was counted: (module, level, metric) -> its value over the ``tested`` rows of all."""
    sums: dict[tuple[int, str, str], Tensor] = {}
    for statistics in ranks:
        for index, level, name, dtype, counted in statistics:
            key, more = (index, level, name), torch.tensor(counted, dtype=getattr(torch, dtype))
            sums[key] = sums[key] + more if key in sums else more
    return {
        (index, level, metric.name): metric.of(total, tested)
        for (index, level, name), total in sums.items()
        for metric in metrics
        if metric.name == name
    }
