"""Event files of TensorBoard in a run directory: ``tensorboard --logdir runs``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.scalars import scalars

FOLDER = "tensorboard"


class TensorBoardLogger:
    """Adds to the event files of a run.

    Args:
        run_dir: the files are in its folder FOLDER.
        config: section -> key -> value; written once, as text and as hyperparameters.
        past: the records of the run so far. What the files hold after these is not shown again (TensorBoard drops it
            when it reads the first event of a new writer), so that a run that goes on has no point twice.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / FOLDER
        known = any(folder.glob("events.out.tfevents.*"))
        first = past[-1]["step"] + 1 if past else 0
        self._writer = SummaryWriter(str(folder), purge_step=first if known else None)
        if not known or not past:
            self._describe(config)
        for record in () if known else past:
            self.record(record)
        self._writer.flush()

    def record(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of an epoch at its step; they are in the file when this returns."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()  # whatever ends this process, the file is complete so far

    def close(self) -> None:
        self._writer.close()

    def _describe(self, config: Mapping[str, Any]) -> None:
        """The configuration, for the tabs Text and HParams."""
        from torch.utils.tensorboard.summary import hparams

        flat = {f"{section}.{name}": value for section, entries in config.items() for name, value in entries.items()}
        lines = ["| key | value |", "|---|---|", *(f"| `{key}` | `{value}` |" for key, value in flat.items())]
        self._writer.add_text("configuration", "\n".join(lines), 0)
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in flat.items()}
        for summary in hparams(plain, {"train/loss": None}):
            self._writer._get_file_writer().add_summary(summary)
