"""localpipe: locally supervised learning as a real pipeline, one process per stage.

    config = load_config(assignments=["method.name=dgl", "model.modules=4"])
    summary = train(config)                                    # under torchrun or in one process

The names below are the public interface; everything else may change.
"""

from pipeline.backbones import UncutModel, backbone_names, build_blocks, register_backbone
from pipeline.config import Config, from_dict, load_config, recipe_names, to_toml
from pipeline.errors import ConfigError, LocalpipeError
from pipeline.heads import AuxiliaryHead
from pipeline.methods import Task, Term, register_method
from pipeline.report import plot_curve, read_metrics
from pipeline.sources import LoaderData
from pipeline.timeline import Event, SteadyState, read_trace, steady_state
from pipeline.trainer import train
from pipeline.version import VERSION as __version__
from pipeline.weights import load_model, weights_sha256

__all__ = [
    "AuxiliaryHead",
    "Config",
    "ConfigError",
    "Event",
    "LoaderData",
    "LocalpipeError",
    "SteadyState",
    "Task",
    "Term",
    "UncutModel",
    "__version__",
    "backbone_names",
    "build_blocks",
    "from_dict",
    "load_config",
    "load_model",
    "plot_curve",
    "read_metrics",
    "read_trace",
    "recipe_names",
    "register_backbone",
    "register_method",
    "steady_state",
    "to_toml",
    "train",
    "weights_sha256",
]
