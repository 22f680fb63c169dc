"""The ranks of a job as replicas x stages: every replica is a whole pipeline, each stage has a twin in all of them.

    4 replicas x 2 stages        stage 0    stage 1
                   replica 0     rank 0 --> rank 1      one pipeline: neighbours, as close as the launcher puts them
                   replica 1     rank 2 --> rank 3
                   replica 2     rank 4 --> rank 5
                   replica 3     rank 6 --> rank 7
                                 twins      twins       the same local modules, averaged after every step
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.base.validation import check_replicas

REPLICAS, STAGES = "replicas", "stages"
"""Names of the dimensions of the DeviceMesh."""


@dataclass(frozen=True)
class Grid:
    """Where a rank is among ``replicas`` x ``stages``."""

    rank: int = 0
    replicas: int = 1
    stages: int = 1

    @property
    def replica(self) -> int:
        """Its pipeline."""
        return self.rank // self.stages

    @property
    def stage(self) -> int:
        """Its place in that."""
        return self.rank % self.stages

    @property
    def leads(self) -> bool:
        """Whether it is of the first replica, which speaks for all of them."""
        return self.replica == 0

    def twins(self, stage: int) -> range:
        """The ranks of a stage in all replicas, this one among them where it is its stage."""
        return range(stage, self.replicas * self.stages, self.stages)

    def named(self, label: str) -> str:
        """What it runs, for messages: its replica too, where there are several."""
        return label if self.replicas == 1 else f"replica {self.replica}, {label}"


def grid_of(config: Config, rank: int, size: int) -> Grid:
    """The place of ``rank`` among the ``size`` processes of a job.

    Raises:
        ConfigError: they are not replicas x stages; a batch cannot be divided among the replicas.
    """
    settings = config.parallel
    if isinstance(settings.replicas, str):
        replicas, rest = divmod(size, settings.stages)
        if rest or not replicas:
            raise ConfigError(
                f"parallel.stages = {settings.stages} with {_processes(size)}, which are no whole number of pipelines; "
                f"start {_nearest(size, settings.stages)} processes"
            )
        check_replicas(config, replicas)
        return Grid(rank, replicas, settings.stages)
    stages, rest = divmod(size, settings.replicas)
    if rest or not stages:
        raise ConfigError(
            f"parallel.replicas = {settings.replicas} with {_processes(size)}: every replica is a pipeline of as many; "
            f"start {_nearest(size, settings.replicas)} processes (torchrun --nproc_per_node=...), or set "
            "parallel.replicas"
        )
    if settings.stages not in (0, stages):
        raise ConfigError(
            f"parallel.replicas = {settings.replicas} x parallel.stages = {settings.stages} with {_processes(size)}; "
            f"start {settings.replicas * settings.stages}, or leave one of them out"
        )
    return Grid(rank, settings.replicas, stages)


def device_mesh(grid: Grid, device: torch.device, backend: str, timeout: timedelta) -> DeviceMesh:
    """The processes of the job as a DeviceMesh. Collective: every rank calls it, once.

    Args:
        backend: of the groups of twins.
        timeout: of their operations.
    """
    groups: Any = dist  # which it has depends on how torch was built
    options = groups.ProcessGroupNCCL.Options() if backend == "nccl" else groups.ProcessGroupGloo._Options()
    options._timeout = timeout
    return init_device_mesh(
        device.type,
        (grid.replicas, grid.stages),
        mesh_dim_names=(REPLICAS, STAGES),
        backend_override={REPLICAS: (backend, options), STAGES: "gloo"},
    )


def _processes(size: int) -> str:
    return "1 process" if size == 1 else f"{size} processes"


def _nearest(size: int, unit: int) -> str:
    """Multiples of ``unit`` around ``size``."""
    below = size - size % unit
    return f"{below} or {below + unit}" if below else str(unit)
