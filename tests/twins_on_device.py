"""Replicas x stages on a device that is none (``helpers_device``): sums over the twins of a stage, which spin on the
device until the last twin has begun them, beside messages between the stages.

Every rank waits for all of its device before every action, as a GPU may do by itself; the sums that it has begun are
on their way then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers_device
import helpers_spinning as spinning
from tiny import Batches, network, tiny_config

import pipeline.local.graphs
import pipeline.ranks.runtime
from pipeline import LoaderData, train
from pipeline.base.validation import with_values
from pipeline.stage.schedule import Action

REPLICAS = 2
LIMIT_S = 20.0
EXACT, LATE = "exact", "async"
PRECISION = {"compute": "fp32", "layers": "plain", "channels_last": "off"}


def wait_for_the_device(step: int, action: Action) -> None:
    spinning.device_wide_wait(LIMIT_S)


def run(kind: str, graphs: bool, waits: bool, run_dir: Path) -> str:
    """Digest of the weights of two stages, each twice; with a cascade, so that gradients cross as well."""
    sections = {"parallel": {"replicas": REPLICAS}, "train": {"epochs": 1}, "checkpoint": {"every_steps": 3}}
    sections |= {"schedule": {"kind": kind}, "precision": dict(PRECISION)}
    config = tiny_config("dgl", "plain", 2, 4, **sections)
    summary = train(
        with_values(config, {"precision.cuda_graphs": graphs}),
        network=network(),
        data=LoaderData(Batches(), Batches()),
        run_dir=run_dir,
        quiet=True,
        before_action=wait_for_the_device if waits else None,
    )
    return str(summary["weights_sha256"])


def on_device(folder: str) -> dict[str, Any]:
    """Of this rank of four, which does nothing else afterwards: weights on the CPU; weights on the device, races, waits
    of the host within steps, and replays of graphs."""
    found: dict[str, Any] = {kind: run(kind, False, False, Path(folder) / kind) for kind in (EXACT, LATE)}
    pipeline.local.graphs.WARM_UP = 1
    backend = helpers_device.CUDA, spinning.SPINNING
    pipeline.ranks.runtime.choose_device = lambda *request: backend
    for kind in (EXACT, LATE):
        with helpers_device.pretended() as device:
            weights = run(kind, kind == EXACT, True, Path(folder) / f"{kind}, device")
            device.look_at_freed()
        found[f"{kind}, device"] = weights, device.races, dict(device.waits_in_step), device.replays
    return found
