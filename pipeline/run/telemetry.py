"""What ranks tell rank 0 while they train. It goes through the store, never through the edges of the pipeline.

    every rank:  post(epoch)  after an epoch           rank 0:  collect() when it has time, in order of epochs
                 pulse()      at most twice a second            live()    for the view
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import torch
import torch.distributed as dist

from pipeline.plan.assembly import Plan
from pipeline.ranks.patience import Patience, wait_for_ranks
from pipeline.ranks.resources import peak_memory_bytes
from pipeline.stage.stage import Counters, Stage
from pipeline.store.records import EpochRecord, LiveModule, ModuleRecord, StageRecord

PULSE_S = 0.5


@dataclasses.dataclass(frozen=True)
class StageReport:
    """One rank's share of an :class:`EpochRecord`, as JSON between ranks."""

    stage: dict[str, Any]
    modules: list[dict[str, Any]]
    images: int
    tested: int
    wrong_final: int | None
    test_loss_sum: float


class Telemetry:
    """The reporter of one rank; on rank 0 also the collector.

    Args:
        store: shared by all ranks, None for one process.
        live: whether anybody watches between epochs.
        deadline_s, patience: of :meth:`collect`.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        plan: Plan,
        device: torch.device,
        live: bool,
        deadline_s: float,
        patience: Patience,
    ) -> None:
        self._store = store
        self._rank = rank
        self._plan = plan
        self._device = device
        self._live = live
        self._deadline_s = deadline_s
        self._patience = patience
        self._ranks = len(plan.stages)
        self._pulses: dict[int, str] = {}
        self._reports: dict[tuple[int, int], str] = {}
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
                rank=self._rank,
                losses={name: float(total) / module.loss_steps for name, total in module.loss_sums.items()},
                busy_fraction=counters.busy_s.get(index, 0.0) / wall,
                wait_fraction=waited / wall,
                queue_depth=counters.queue_depth_sum / max(counters.queue_depth_count, 1),
                peak_memory_bytes=peak_memory_bytes(self._device),
            )
            for index, module in stage.modules.items()
        ]
        text = json.dumps([dataclasses.asdict(module) for module in modules])
        if self._store is None or self._rank == 0:
            self._pulses[self._rank] = text
        else:
            self._store.set(f"pulse/{self._rank}", text)

    def live(self) -> tuple[LiveModule, ...]:
        """The latest live numbers of every rank that has published some (rank 0)."""
        if self._store is not None:
            for rank in range(1, self._ranks):
                if self._store.check([f"pulse/{rank}"]):
                    self._pulses[rank] = self._store.get(f"pulse/{rank}").decode()
        return tuple(
            LiveModule(**entry) for rank in sorted(self._pulses) for entry in json.loads(self._pulses[rank])
        )

    def post(self, epoch: int, stage: Stage, counters: Counters, wait_s: float, wall_s: float, sent: int) -> None:
        """Publish this rank's numbers of a finished epoch. ``sent``: bytes sent since the run began."""
        index_of_last = len(self._plan.modules) - 1
        wrong = {key: int(count) for key, count in counters.wrong.items()}
        modules = []
        for index, module in stage.modules.items():
            errors: dict[str, float | None] = {}
            for level in [*module.levels, *(["final"] if module.plan.final else [])]:
                count = wrong.get((index, level))
                errors[level] = 100.0 * count / counters.tested if count is not None and counters.tested else None
            record = ModuleRecord(
                index=index,
                rank=self._rank,
                blocks=self._plan.cut.label(index),
                losses=module.take_losses(),
                head_error_pct=errors,
                busy_s=counters.busy_s.get(index, 0.0),
                skipped_steps=module.take_skipped(),
            )
            modules.append(dataclasses.asdict(record))
        record = StageRecord(
            rank=self._rank,
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
            wrong_final=wrong.get((index_of_last, "final")),
            test_loss_sum=counters.test_loss_sum,
        )
        text = json.dumps(dataclasses.asdict(report))
        if self._store is None or self._rank == 0:
            self._reports[epoch, self._rank] = text
        else:
            self._store.set(f"epoch/{epoch}/{self._rank}", text)

    def collect(self, epoch: int, wait: bool) -> list[StageReport] | None:
        """All ranks' reports of ``epoch`` (rank 0), or None if some are missing and ``wait`` is false.

        Raises:
            DeadlineExceeded: with ``wait``, a rank does not report, and is not just slow.
        """
        missing = [rank for rank in range(self._ranks) if (epoch, rank) not in self._reports]
        keys = {rank: f"epoch/{epoch}/{rank}" for rank in missing}
        if keys:
            assert self._store is not None
            if not wait and not self._store.check(list(keys.values())):
                return None
            wait_for_ranks(self._store, self._rank, keys, f"report epoch {epoch}", self._deadline_s, self._patience)
            for rank, key in keys.items():
                self._reports[epoch, rank] = self._store.get(key).decode()
                self._store.delete_key(key)
        return [StageReport(**json.loads(self._reports.pop((epoch, rank)))) for rank in range(self._ranks)]


def merge(
    reports: list[StageReport], *, epoch: int, epochs: int, step: int, learning_rate: float
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
        test_error_pct=100.0 * (last.wrong_final or 0) / tested if tested else None,
        test_loss=last.test_loss_sum / tested if tested else None,
        stages=stages,
        modules=modules,
    )
