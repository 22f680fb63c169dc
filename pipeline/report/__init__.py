"""What a user sees of a run: records of it, the view in the terminal, and the files it leaves behind."""

from pipeline.report.curve import plot_curve
from pipeline.report.records import EpochRecord, LiveModule, ModuleRecord, Progress, StageRecord
from pipeline.report.run_directory import RunDirectory, read_metrics, summarise
from pipeline.report.view import View, open_view

__all__ = [
    "EpochRecord",
    "LiveModule",
    "ModuleRecord",
    "Progress",
    "RunDirectory",
    "StageRecord",
    "View",
    "open_view",
    "plot_curve",
    "read_metrics",
    "summarise",
]
