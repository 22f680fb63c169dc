"""What a rank does before step 0, piece by piece; the trainer puts it in order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics, resolve_numerics
from pipeline.base.validation import validate
from pipeline.data.image_source import ImageSource
from pipeline.data.loader_source import LoaderData, LoaderSource
from pipeline.data.source import DataSpec, Source
from pipeline.edges.connect import Edges, EdgeSpecs, connect
from pipeline.local.compilation import refuse_without_compiler
from pipeline.local.task import Classification, Task
from pipeline.models.backbones import Blocks, blocks_of
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan.assembly import Plan
from pipeline.plan.cut import make_cut
from pipeline.plan.placement import given, place
from pipeline.ranks.runtime import Runtime
from pipeline.ranks.team import Team


def named_after(config: Config, network: nn.Sequential | None, data: LoaderData | None) -> Config:
    """The configuration with the names and the batch size of a user's own network and loaders."""
    if network is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name="custom"))
    if data is not None:
        batch = getattr(data.train, "batch_size", None) or config.data.batch_size
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name="loader", batch_size=batch))
    return validate(config)


def refuse_early(config: Config, network: nn.Sequential | None, runtime: Runtime) -> Numerics:
    """Refusals that need no data: more modules than blocks, more ranks than modules, a layout that cannot work."""
    blocks = blocks_of(network) if network is not None else planned_blocks(config.model.name, 3, 10)
    count = len(make_cut(list(blocks), config.model))
    if config.partition.kind == "given":
        given(config.partition.stages, count, runtime.team.size)
    place(count, runtime.team.size)
    if config.precision.compile:
        refuse_without_compiler(runtime.device)
    return resolve_numerics(config.precision, runtime.device, blocks.values())


def open_source(
    config: Config, data: LoaderData | None, numerics: Numerics, runtime: Runtime
) -> tuple[Source | None, DataSpec]:
    """The data on rank 0, and what all ranks must know of it. Collective."""
    source: Source | None = None
    if runtime.team.leads:
        if data is not None:
            source = LoaderSource(data, config, numerics, runtime.desk.progress)
        else:
            source = ImageSource(config, numerics)
    return source, runtime.team.broadcast(source.data_spec if source is not None else None)


def blocks_and_task(config: Config, network: nn.Sequential | None, data_spec: DataSpec) -> tuple[Blocks, Task]:
    """The network in blocks, without weights unless it is the user's own, and what it is for."""
    if network is None:
        if data_spec.classes == 0:
            raise ConfigError("your own loaders need your own network: pass network=nn.Sequential(...)")
        blocks = planned_blocks(config.model.name, data_spec.image_shape[0], data_spec.classes, config.train.seed)
        return blocks, Classification(data_spec.classes, data_spec.image_shape)
    blocks = blocks_of(network)
    return blocks, Classification(data_spec.classes or _classes_of(blocks), data_spec.image_shape)


def connect_stage(config: Config, plan: Plan, numerics: Numerics, runtime: Runtime) -> Edges:
    """The edges of this rank. Collective."""
    rank, last = runtime.team.rank, runtime.team.size - 1
    wire = (numerics.dtype, numerics.channels_last)

    def gradients(sender: int) -> Any:
        return plan.gradient_spec(sender, *wire) if plan.gradient_order(sender) else None

    specs = EdgeSpecs(
        activation_in=plan.activation_spec(rank - 1, *wire) if rank > 0 else None,
        activation_out=plan.activation_spec(rank, *wire) if rank < last else None,
        gradient_in=gradients(rank + 1) if rank < last else None,
        gradient_out=gradients(rank) if rank > 0 else None,
    )
    settings = config.runtime
    return connect(
        runtime.team,
        specs,
        activation_slots=plan.activation_slots(rank),
        gradient_slots=plan.gradient_slots(rank),
        depth=settings.queue_depth,
        device=runtime.device,
        backend=runtime.backend,
        ring=config.schedule.ring if config.schedule.kind == "free" else 0,
        max_uses=config.schedule.max_uses,
    )


def refuse_private_directory(team: Team, run_dir: Path) -> None:
    """All ranks write their checkpoints below the run directory, so on several machines it must be one. Collective.

    Raises:
        ConfigError: a rank does not see what rank 0 has written there.
    """
    seen = team.gather((run_dir / "config.toml").is_file())
    blind = [str(rank) for rank, there in enumerate(seen or ()) if not there]
    blind = team.broadcast(blind)
    if blind:
        raise ConfigError(
            f"run directory '{run_dir}' of rank 0 is not visible on rank {', '.join(blind)}; on several machines use "
            "--run-dir on a file system that all share"
        )


def _classes_of(blocks: Blocks) -> int:
    """Outputs of the last linear layer of a user's network."""
    linear = [m for block in blocks.values() for m in block.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError("the network has no linear layer at its end, so its number of classes is unknown; add one")
    return linear[-1].out_features
