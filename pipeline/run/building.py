"""The stage of one rank put together: its edges, its inlet, what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from pipeline.base.config import Config
from pipeline.base.errors import LocalpipeError
from pipeline.base.numerics import Numerics
from pipeline.data.source import DataSpec, Source
from pipeline.edges.connect import Edges, EdgeSpecs, connect
from pipeline.edges.twins import Twins
from pipeline.edges.wire import FOREVER, MessageSpec
from pipeline.local.late_parts import shared_out
from pipeline.local.local_module import LocalModule
from pipeline.local.module_state import BUSY, restore_module
from pipeline.plan.assembly import Plan
from pipeline.plan.memory import explain_out_of_memory
from pipeline.ranks.grid import REPLICAS, Grid, device_mesh
from pipeline.ranks.runtime import Runtime
from pipeline.run.loop import total_steps
from pipeline.stage.averaging import Averaging
from pipeline.stage.inlet import DataInlet, Inlet, Orders, edge_inlet
from pipeline.stage.stage import Stage
from pipeline.stage.watch import Progress, Watch
from pipeline.store.checkpoint import Checkpoint, open_verified
from pipeline.store.records import EpochRecord
from pipeline.store.resume import Position, Start, check_fits, records_of


def open_checkpoint(start: Start, plan: Plan, data_spec: DataSpec) -> Checkpoint | None:
    """The checkpoint to go on from; rank 0 has verified its bytes."""
    if start.checkpoint is None:
        return None
    saved = open_verified(start.checkpoint)
    names = [list(names) for names in plan.cut.modules]
    task, total = plan.task, total_steps(plan.config, data_spec)
    check_fits(saved, names, task.classes, task.image_shape, data_spec.train_batches, total)
    return saved


def connect_stage(plan: Plan, numerics: Numerics, runtime: Runtime, grid: Grid) -> Edges:
    """The edges of this rank. Collective."""
    rank, last = grid.stage, grid.stages - 1
    wire = (numerics.dtype, numerics.channels_last)

    def gradients(sender: int) -> MessageSpec | None:
        return plan.gradient_spec(sender, *wire) if plan.gradient_order(sender) else None

    def weights(receiver: int) -> MessageSpec | None:
        module = plan.stages[receiver][-1]
        return plan.upstream.spec(module, numerics.weight_dtype) if plan.upstream is not None else None

    specs = EdgeSpecs(
        activation_in=plan.activation_spec(rank - 1, *wire) if rank > 0 else None,
        activation_out=plan.activation_spec(rank, *wire) if rank < last else None,
        gradient_in=gradients(rank + 1) if rank < last else None,
        gradient_out=gradients(rank) if rank > 0 else None,
        weights_in=weights(rank) if rank < last else None,
        weights_out=weights(rank - 1) if rank > 0 else None,
    )
    config = plan.config
    return connect(
        runtime.team,
        specs,
        activation_slots=plan.activation_slots(rank),
        gradient_slots=plan.gradient_slots(rank),
        weights_slots=plan.upstream.declared.copies if plan.upstream is not None else 0,
        depth=config.runtime.queue_depth,
        device=runtime.device,
        backend=runtime.backend,
        ring=config.schedule.ring if config.schedule.kind == "free" else 0,
        max_uses=config.schedule.max_uses,
        replicas=grid.replicas,
    )


def connect_twins(runtime: Runtime, grid: Grid) -> tuple[Averaging | None, Twins | None]:
    """What averages over the replicas, and what their first stages agree on orders by; None, None of one replica.
    Collective."""
    if grid.replicas == 1:
        return None, None
    team, device = runtime.team, runtime.device
    mesh = device_mesh(grid, device, runtime.backend, FOREVER)
    averaging = Averaging(Twins(team, grid, mesh.get_group(REPLICAS), "gradients"))
    group = dist.new_group(list(grid.twins(0)), FOREVER, "gloo")  # on the host, whatever carries the gradients
    orders = Twins(team, grid, group, "orders") if isinstance(group, dist.ProcessGroup) and grid.stage == 0 else None
    return averaging, orders


def inlet_of(
    edges: Edges, source: Source | None, config: Config, orders: Orders, progress: Progress
) -> Inlet:
    """Where the input of this rank comes from."""
    if edges.activation_in is not None:
        return edge_inlet(edges.activation_in)
    assert source is not None
    return DataInlet(source, config.schedule.micro_batches, orders, config.schedule.kind == "free", progress)


def stage_of(
    plan: Plan,
    rank: int,
    modules: Sequence[LocalModule],
    inlet: Inlet,
    edges: Edges,
    watch: Watch,
    averaging: Averaging | None = None,
) -> Stage:
    """Stage ``rank`` of a pipeline."""
    return Stage(
        modules,
        plan.schedules[rank],
        inlet,
        edges,
        plan.gradient_order(rank + 1) if rank + 1 < len(plan.stages) else (),
        plan.image_crosses(rank),
        marks_epochs=plan.config.schedule.kind == "free",
        watch=watch,
        averaging=averaging,
    )


def restore(stage: Stage, saved: Checkpoint | None, grid: Grid) -> tuple[Position, list[EpochRecord]]:
    """Put what was saved into the modules of a stage; where the run goes on, and the epochs before."""
    if saved is None:
        return Position(), []
    for index, module in stage.modules.items():
        state, parts = saved.module_state(index), saved.parts(index)
        if parts or (grid.replicas > 1 and module.stashes is not None):
            state = shared_out(state, parts, grid.replica, grid.replicas, stage.micro_batches)
        restore_module(module, state)
        if BUSY in state:
            stage.watch.busy_s[index] = float(state[BUSY])
    stage.restored()
    return Position.of(saved), records_of(saved)


@contextmanager
def explained_failures(
    runtime: Runtime, grid: Grid, plan: Plan, numerics: Numerics, modules: Sequence[LocalModule], watch: Watch
) -> Iterator[None]:
    """Inside, a failure is reported with the module at work, and with what is held where memory has run out."""
    try:
        yield
    except (LocalpipeError, KeyboardInterrupt):
        raise
    except Exception as error:
        explained = explain_out_of_memory(error, plan, grid.stage, numerics, modules)
        action = watch.current
        module = None
        if action is not None:
            module = grid.named(f"module {action.module} ({plan.cut.label(action.module)})")
        runtime.failures.report(explained or error, module)
