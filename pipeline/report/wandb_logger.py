"""A run of Weights & Biases. Its own variables say where it goes: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ..."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.scalars import scalars

ID, PROJECT = "wandb.id", "localpipe"
"""The file of a run directory that holds the run's id; the project where nobody names one."""


class WandbLogger:
    """Adds to a run of Weights & Biases, which a resumed run goes on with.

    Args:
        run_dir: holds the id in its file ID, and what W&B itself keeps in its folder wandb.
        config: section -> key -> value, sent once.
        past: the records of the run so far. A run that W&B does not know yet gets them first; one that it knows has
            them, and takes no step a second time.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        file = run_dir / ID
        known = bool(past) and file.exists()
        if not known:
            file.write_text(f"{uuid.uuid4().hex}\n", encoding="utf-8")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),  # the screen is the view's
        )
        for record in () if known else past:
            self.record(record)

    def record(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of an epoch at its step."""
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()
