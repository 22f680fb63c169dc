"""What a user sees of a run: records of it, the view in the terminal, and the files it leaves behind."""

from pipeline.report.curve import plot_curve
from pipeline.report.plan_view import Placement, PlannedModule, PlannedRank, PlanReport, schedule_text, show_plan
from pipeline.report.records import EpochRecord, LiveModule, ModuleRecord, Progress, StageRecord
from pipeline.report.run_directory import RunDirectory, read_metrics, summarise
from pipeline.report.timeline_chart import plot_timeline
from pipeline.report.view import View, open_view

__all__ = [
    "EpochRecord",
    "LiveModule",
    "ModuleRecord",
    "Placement",
    "PlanReport",
    "PlannedModule",
    "PlannedRank",
    "Progress",
    "RunDirectory",
    "StageRecord",
    "View",
    "open_view",
    "plot_curve",
    "plot_timeline",
    "read_metrics",
    "schedule_text",
    "show_plan",
    "summarise",
]
