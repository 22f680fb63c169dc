"""localpipe: locally supervised learning as a real pipeline, one process per stage.

    config = load_config(assignments=["method.name=dgl", "model.modules=4"])
    summary = train(config)                                    # under torchrun or in one process

The names below are the public interface; everything else may change. Those that need torch are imported when they are
first used: a command can parse its arguments, refuse a configuration and note a signal before the seconds that takes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError, LocalpipeError
from pipeline.base.recipes import Recipe, load_config, recipe_names, recipes, recipes_text
from pipeline.base.reference import keys_markdown
from pipeline.base.toml import to_toml
from pipeline.base.validation import from_dict
from pipeline.base.version import VERSION as __version__
from pipeline.ranks.command import command
from pipeline.report.loggers import refuse_missing_loggers

if TYPE_CHECKING:
    from pipeline.base.alive import Alive
    from pipeline.base.flow import TensorSpec
    from pipeline.data.loader_source import LoaderData
    from pipeline.doctor.diagnose import diagnose
    from pipeline.doctor.finding import Diagnosis, Finding
    from pipeline.local.methods import register_method
    from pipeline.local.next_token import NextToken
    from pipeline.local.segmentation import Segmentation
    from pipeline.local.task import Classification, Metric, Task
    from pipeline.local.term import Term
    from pipeline.local.upstream import Upstream
    from pipeline.local.weights import load_model, weights_sha256
    from pipeline.models.backbones import UncutModel, backbone_names, build_blocks, register_backbone
    from pipeline.models.heads import AuxiliaryHead, Given, TaskHead
    from pipeline.plan.cost import StepCost, step_cost
    from pipeline.plan.cost_profile import Profile
    from pipeline.plan.explain import explain, measure
    from pipeline.plan.step_memory import StepMemory, step_memory
    from pipeline.report.compare import Comparison, compare
    from pipeline.report.compare_view import plot_comparison, show_comparison
    from pipeline.report.curve import plot_curve
    from pipeline.report.exits import Evaluation, ExitRow, show_evaluation
    from pipeline.report.findings_view import show_finding, show_verdict
    from pipeline.report.plan_view import schedule_text, show_plan
    from pipeline.report.timeline_chart import plot_timeline
    from pipeline.run.evaluation import evaluate
    from pipeline.run.train import train
    from pipeline.stage.events import Event, SteadyState, read_trace, steady_state
    from pipeline.store.exporting import Exported, export
    from pipeline.store.hub import load_exported
    from pipeline.store.run_directory import read_metrics

__all__ = [
    "Alive",
    "AuxiliaryHead",
    "Classification",
    "Comparison",
    "Config",
    "ConfigError",
    "Diagnosis",
    "Evaluation",
    "Event",
    "ExitRow",
    "Exported",
    "Finding",
    "Given",
    "LoaderData",
    "LocalpipeError",
    "Metric",
    "NextToken",
    "Profile",
    "Recipe",
    "Segmentation",
    "SteadyState",
    "StepCost",
    "StepMemory",
    "Task",
    "TaskHead",
    "TensorSpec",
    "Term",
    "UncutModel",
    "Upstream",
    "__version__",
    "backbone_names",
    "build_blocks",
    "command",
    "compare",
    "diagnose",
    "evaluate",
    "explain",
    "export",
    "from_dict",
    "keys_markdown",
    "load_config",
    "load_exported",
    "load_model",
    "measure",
    "plot_comparison",
    "plot_curve",
    "plot_timeline",
    "read_metrics",
    "read_trace",
    "recipe_names",
    "recipes",
    "recipes_text",
    "refuse_missing_loggers",
    "register_backbone",
    "register_method",
    "schedule_text",
    "show_comparison",
    "show_evaluation",
    "show_finding",
    "show_plan",
    "show_verdict",
    "steady_state",
    "step_cost",
    "step_memory",
    "to_toml",
    "train",
    "weights_sha256",
]

_NEED_TORCH = {
    "pipeline.data.loader_source": ("LoaderData",),
    "pipeline.base.alive": ("Alive",),
    "pipeline.base.flow": ("TensorSpec",),
    "pipeline.doctor.diagnose": ("diagnose",),
    "pipeline.doctor.finding": ("Diagnosis", "Finding"),
    "pipeline.local.methods": ("register_method",),
    "pipeline.local.next_token": ("NextToken",),
    "pipeline.local.segmentation": ("Segmentation",),
    "pipeline.local.task": ("Classification", "Metric", "Task"),
    "pipeline.local.term": ("Term",),
    "pipeline.local.upstream": ("Upstream",),
    "pipeline.local.weights": ("load_model", "weights_sha256"),
    "pipeline.models.backbones": ("UncutModel", "backbone_names", "build_blocks", "register_backbone"),
    "pipeline.models.heads": ("AuxiliaryHead", "Given", "TaskHead"),
    "pipeline.plan.cost": ("StepCost", "step_cost"),
    "pipeline.plan.cost_profile": ("Profile",),
    "pipeline.plan.explain": ("explain", "measure"),
    "pipeline.plan.step_memory": ("StepMemory", "step_memory"),
    "pipeline.report.compare": ("Comparison", "compare"),
    "pipeline.report.compare_view": ("plot_comparison", "show_comparison"),
    "pipeline.report.curve": ("plot_curve",),
    "pipeline.report.exits": ("Evaluation", "ExitRow", "show_evaluation"),
    "pipeline.report.findings_view": ("show_finding", "show_verdict"),
    "pipeline.report.plan_view": ("schedule_text", "show_plan"),
    "pipeline.report.timeline_chart": ("plot_timeline",),
    "pipeline.run.evaluation": ("evaluate",),
    "pipeline.run.train": ("train",),
    "pipeline.stage.events": ("Event", "SteadyState", "read_trace", "steady_state"),
    "pipeline.store.exporting": ("Exported", "export"),
    "pipeline.store.hub": ("load_exported",),
    "pipeline.store.run_directory": ("read_metrics",),
}


def __getattr__(name: str) -> Any:
    """A public name that needs torch, on its first use."""
    for module, names in _NEED_TORCH.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
