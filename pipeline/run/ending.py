"""How a run ends: stopped by a signal, or complete with its weights and its summary."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.errors import warn
from pipeline.local.local_module import LocalModule
from pipeline.local.weights import State, heads_state, model_state, module_weights, weights_sha256
from pipeline.ranks.team import Team
from pipeline.report.curve import plot_curve
from pipeline.report.view import View
from pipeline.run.loop import Loop, Run
from pipeline.store.run_directory import METRICS, RunDirectory, summarise
from pipeline.store.weights_file import HEADS, MODEL, write_weights

CURVE = "curve.png"


@dataclass(frozen=True)
class Outcome:
    """Where and why a run was stopped; ``checkpoint``: what it goes on from, None where nothing was trained."""

    directory: RunDirectory
    reason: str
    step: int
    checkpoint: Path | None


def stopped(team: Team, outcome: Outcome, view: View | None = None) -> dict[str, Any]:
    """Say that a signal has ended the run early, in order."""
    if view is not None:
        view.close()
    if team.leads:
        when = f"after step {outcome.step}" if outcome.step else "before step 0"
        what = "nothing was trained" if outcome.checkpoint is None else f"saved in {outcome.checkpoint}"
        print(
            f"localpipe: stopped by {outcome.reason} {when}; {what}; goes on with --resume auto --run-dir "
            f"{outcome.directory.path}",
            flush=True,
        )
    return {
        "stopped": outcome.reason,
        "step": outcome.step,
        "checkpoint": None if outcome.checkpoint is None else str(outcome.checkpoint),
        "run_directory": str(outcome.directory.path),
    }


def unsaved(problem: str) -> str:
    """For the message of a run whose last checkpoint failed."""
    return f"its last checkpoint was not saved: {problem}; older ones are untouched"


def finish(run: Run, loop: Loop, modules: Sequence[LocalModule]) -> dict[str, Any]:
    """Collect weights and write the run directory; returns the summary on every rank. Collective."""
    team = run.runtime.team
    mine = modules if run.grid.leads else ()
    gathered = team.gather({module.plan.index: module_weights(module) for module in mine})
    summary: dict[str, Any] | None = None
    if gathered is not None and run.view is not None:
        every = {index: state for part in gathered for index, state in part.items()}
        ordered = [every[index] for index in range(len(run.plan.modules))]
        loop.keep_directory()
        write_weights(run.directory.path / MODEL, model_state(ordered))
        write_weights(run.directory.path / HEADS, heads_state(ordered))
        summary = summarise(loop.records, settings=_settings(run, modules[0], ordered))
        run.directory.write_summary(summary)
        run.view.finish(summary)
    summary = team.broadcast(summary)
    assert summary is not None  # rank 0 has written it
    return summary


def draw_curve(directory: RunDirectory) -> None:
    """Draw CURVE of a complete run (rank 0), where matplotlib is there. What goes wrong costs a line, and no run."""
    if without_curve():
        return
    try:
        plot_curve(directory.path / METRICS, directory.path / CURVE)
    except Exception as error:  # whatever matplotlib stumbles over
        warn(f"{CURVE} could not be drawn: {type(error).__name__}: {error}")


def without_curve() -> str:
    """What to say at the start where matplotlib, an optional dependency, is missing; else nothing."""
    if importlib.util.find_spec("matplotlib") is not None:
        return ""
    return f"{CURVE} will not be drawn: it needs matplotlib: pip install localpipe[plot] (or set log.curve=false)"


def _settings(run: Run, module: LocalModule, states: list[State]) -> dict[str, Any]:
    config, modules = run.config, len(run.plan.modules)
    return {
        "name": config.model.name,
        "data": config.data.name,
        "method": config.method.name if modules > 1 else "bp",
        "cascade_span": config.hierarchy.cascade_span,
        "patches_grid": config.patches.grid,
        "schedule": config.schedule.kind,
        "micro_batches": config.schedule.micro_batches,
        "modules": modules,
        "world_size": run.runtime.team.size,
        "replicas": run.grid.replicas,
        "seed": config.train.seed,
        "precision": str(module.numerics.dtype).removeprefix("torch."),
        "config_sha256": config.fingerprint(),
        "weights_sha256": weights_sha256(states),
        "run_directory": str(run.directory.path),
    }
