"""Made-up but realistic runs for the report tests: any number of modules over any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pipeline.base.metric import ERROR, MetricForm
from pipeline.store.records import EpochProgress, EpochRecord, LiveModule, ModuleRecord, StageRecord

GIB = 2**30


@dataclass(frozen=True)
class SampleRun:
    """Builds the records of a run with ``modules`` local modules on ``ranks`` ranks."""

    modules: int
    ranks: int
    epochs: int = 20
    metric: MetricForm = ERROR

    def rank_of(self, module: int) -> int:
        return module * self.ranks // self.modules

    def blocks(self) -> list[str]:
        groups = [1 + 3 * module // self.modules for module in range(self.modules)]
        names = [f"layer{group}.{module}-layer{group}.{module + 1}" for module, group in enumerate(groups)]
        return ["stem-layer1.0", *names[1:]]

    def losses(self, module: int, epoch: int) -> dict[str, float]:
        base = 2.3 / (1 + 0.4 * epoch) + 0.001 * module
        if module == self.modules - 1:
            return {"final": base}
        return {
            "independent.reconstruction": 0.05 + base / 10,
            "independent.task": 1.3 * base,
            "cascade.task": 1.1 * base,
        }

    def errors(self, module: int, epoch: int) -> dict[str, float | None]:
        base = 60 / (1 + epoch) - 0.02 * module
        if module == self.modules - 1:
            return {"final": base}
        return {"independent": base + 4, "cascade": base + 1}

    def epoch(self, epoch: int) -> EpochRecord:
        stages = tuple(
            StageRecord(
                rank=rank,
                device=f"cuda:{rank}",
                modules=tuple(m for m in range(self.modules) if self.rank_of(m) == rank),
                busy_s=91.0 - rank,
                wait_s=5.0 + rank,
                wall_s=100.0,
                queue_depth=1.5,
                peak_memory_bytes=(11 - rank) * GIB,
                bytes_sent=3 * GIB // 2,
            )
            for rank in range(self.ranks)
        )
        is_error = self.metric == ERROR
        modules = tuple(
            ModuleRecord(
                m,
                self.rank_of(m),
                self.blocks()[m],
                self.losses(m, epoch),
                errors if is_error else dict.fromkeys(errors),
                {} if is_error else {f"{level}.{self.metric.name}": value for level, value in errors.items()},
            )
            for m in range(self.modules)
            for errors in [self.errors(m, epoch)]
        )
        measured = self.errors(self.modules - 1, epoch)["final"]
        return EpochRecord(
            epoch=epoch,
            epochs=self.epochs,
            step=195 * epoch,
            images=49920,
            wall_s=100.0,
            images_per_s=499.2,
            learning_rate=0.0532,
            train_loss=self.losses(self.modules - 1, epoch)["final"],
            test_error_pct=measured if is_error else None,
            test_loss=0.21,
            stages=stages,
            modules=modules,
            test_metrics={} if is_error else {self.metric.name: measured},
            metric=self.metric,
        )

    def progress(self, epoch: int, batch: int, phase: str = "train") -> EpochProgress:
        live = tuple(
            LiveModule(m, self.rank_of(m), self.losses(m, epoch), 0.91, 0.05, 1.5, 11 * GIB)
            for m in range(self.modules)
        )
        return EpochProgress(epoch, self.epochs, batch, 195, 499.2, 1841.0, phase, live)


@pytest.fixture
def sample_run() -> Callable[[int, int], SampleRun]:
    return SampleRun
