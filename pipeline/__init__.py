"""localpipe: locally supervised learning as a real pipeline, one process per stage.

    config = load_config(assignments=["method.name=dgl", "model.modules=4"])
    summary = train(config)                                    # under torchrun or in one process

The names below are the public interface; everything else may change.
"""

from pipeline.backbones import UncutModel, backbone_names, build_blocks, register_backbone
from pipeline.config import Config, from_dict, load_config, recipe_names, to_toml
from pipeline.cost import StepCost, step_cost
from pipeline.cost_profile import Profile
from pipeline.errors import ConfigError, LocalpipeError
from pipeline.evaluation import Evaluation, ExitRow, evaluate, show_evaluation
from pipeline.exporting import Exported, export
from pipeline.heads import AuxiliaryHead
from pipeline.methods import Task, Term, register_method
from pipeline.planning import explain, measure
from pipeline.report import plot_curve, plot_timeline, read_metrics, schedule_text, show_plan
from pipeline.sources import LoaderData
from pipeline.timeline import Event, SteadyState, read_trace, steady_state
from pipeline.trainer import train
from pipeline.version import VERSION as __version__
from pipeline.weights import load_model, weights_sha256

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
    "load_config",
    "load_model",
    "measure",
    "plot_curve",
    "plot_timeline",
    "read_metrics",
    "read_trace",
    "recipe_names",
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
