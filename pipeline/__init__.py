"""localpipe: locally supervised learning as a real pipeline, one process per stage.

    config = load_config(assignments=["method.name=dgl", "model.modules=4"])
    summary = train(config)                                    # under torchrun or in one process

The names below are the public interface; everything else may change.
"""

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError, LocalpipeError
from pipeline.base.recipes import load_config, recipe_names, recipes_text
from pipeline.base.reference import keys_markdown
from pipeline.base.toml import to_toml
from pipeline.base.validation import from_dict
from pipeline.base.version import VERSION as __version__
from pipeline.data.loader_source import LoaderData
from pipeline.local.methods import Task, Term, register_method
from pipeline.local.weights import load_model, weights_sha256
from pipeline.models.backbones import UncutModel, backbone_names, build_blocks, register_backbone
from pipeline.models.heads import AuxiliaryHead
from pipeline.plan.cost import StepCost, step_cost
from pipeline.plan.cost_profile import Profile
from pipeline.plan.explain import explain, measure
from pipeline.report.curve import plot_curve
from pipeline.report.plan_view import schedule_text, show_plan
from pipeline.report.timeline_chart import plot_timeline
from pipeline.run.evaluation import Evaluation, ExitRow, evaluate, show_evaluation
from pipeline.run.train import train
from pipeline.stage.events import Event, SteadyState, read_trace, steady_state
from pipeline.store.exporting import Exported, export
from pipeline.store.run_directory import read_metrics

__all__ = [
    "AuxiliaryHead",
    "Config",
    "ConfigError",
    "Evaluation",
    "Event",
    "ExitRow",
    "Exported",
    "LoaderData",
    "LocalpipeError",
    "Profile",
    "SteadyState",
    "StepCost",
    "Task",
    "Term",
    "UncutModel",
    "__version__",
    "backbone_names",
    "build_blocks",
    "evaluate",
    "explain",
    "export",
    "from_dict",
    "keys_markdown",
    "load_config",
    "load_model",
    "measure",
    "plot_curve",
    "plot_timeline",
    "read_metrics",
    "read_trace",
    "recipe_names",
    "recipes_text",
    "register_backbone",
    "register_method",
    "schedule_text",
    "show_evaluation",
    "show_plan",
    "steady_state",
    "step_cost",
    "to_toml",
    "train",
    "weights_sha256",
]
