"""A tiny network, tiny data and short ways to build stages from them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.base.config import Config
from pipeline.base.numerics import Numerics
from pipeline.base.validation import from_dict, validate
from pipeline.edges.connect import Edges
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Classification
from pipeline.models.backbones import BasicBlock
from pipeline.plan.assembly import Plan, build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage

CLASSES = 4
IMAGE = (3, 8, 8)
STEPS = 5
ROWS = 8
METHODS: dict[str, dict[str, Any]] = {
    "dgl": {"name": "dgl"},
    "dgl-mlp": {"name": "dgl", "head": "mlp"},
    "dgl-cnn": {"name": "dgl", "head": "cnn"},
    "dgl-auglocal": {"name": "dgl", "head": "auglocal"},
    "predsim": {"name": "predsim", "prediction_inputs": 16},
    "infopro": {"name": "infopro", "head": "1c2f", "feature_dim": 8},
    "infopro-2c2f": {"name": "infopro", "head": "2c2f", "feature_dim": 8},
    "infopro-contrast": {"name": "infopro-contrast", "feature_dim": 8, "reconstruction": [5.0, 0.2]},
    "greedy": {"name": "greedy"},
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"patches": {"grid": 1}},
    "hpff": {"patches": {"grid": 2, "at_once": 4}},  # "auto" takes as many, and half a second to find out
    "released": {
        "patches": {"grid": 2, "at_once": 4},
        "hierarchy": {"variant": "released", "independent_weight": 0.3, "cascade_weight": 0.7},
    },
}


def tiny_blocks() -> OrderedDict[str, nn.Module]:
    """Six blocks: stem, four residual blocks (one with stride 2), classifier."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return OrderedDict(
        [
            ("stem", stem),
            ("a", BasicBlock(4, 4, 1)),
            ("b", BasicBlock(4, 6, 2)),
            ("c", BasicBlock(6, 6, 1)),
            ("d", BasicBlock(6, 6, 1)),
            ("classifier", classifier),
        ]
    )


def tiny_config(
    method: str = "dgl", variant: str = "plain", span: int = 1, modules: int = 5, **sections: dict[str, Any]
) -> Config:
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "tiny", "modules": modules},
        "method": dict(METHODS[method]),
        "hierarchy": {"cascade_span": span},
        "patches": {},
        "data": {"batch_size": 8},
        "optim": {"warmup_epochs": 0, "schedule": "constant", "lr": 0.05},
        "precision": {"compute": "fp32"},
        "partition": {"kind": "count"},  # so that a test knows who owns what
        "log": {"curve": False},  # it takes a second
        "runtime": {"device": "cpu", "threads": 1, "deadline_s": 30.0},
    }
    for section, entries in [*VARIANTS[variant].items(), *sections.items()]:
        values.setdefault(section, {}).update(entries)
    return validate(from_dict(values))


def tiny_plan(config: Config, ranks: int = 1, image: tuple[int, ...] = IMAGE) -> Plan:
    return make_plan(config, tiny_blocks(), Classification(CLASSES, image), ranks)


def tiny_stage(
    config: Config, dtype: torch.dtype = torch.float32, image: tuple[int, ...] = IMAGE
) -> tuple[Stage, list[LocalModule], Plan]:
    """All modules of the tiny network in one stage without neighbours."""
    plan = tiny_plan(config, image=image)
    modules = build_modules(plan, 0, tiny_blocks(), Numerics(torch.device("cpu"), dtype, False), fresh=True)
    inlet = BatchInlet(micro_batches=config.schedule.micro_batches)
    return Stage(modules, plan.schedules[0], inlet, Edges()), modules, plan


def train_on(stage: Stage, epoch: int, step: int, batch: Batch) -> None:
    """One training step of a stage without neighbours."""
    assert isinstance(stage.inlet, BatchInlet)
    stage.inlet.batch = batch
    stage.train_step(epoch, step)


def evaluate_on(stage: Stage, epoch: int, step: int, batch: Batch) -> None:
    """One test batch of a stage without neighbours."""
    assert isinstance(stage.inlet, BatchInlet)
    stage.inlet.batch = batch
    stage.test_step(epoch, step)


def tiny_batch(
    step: int = 0, rows: int = 8, dtype: torch.dtype = torch.float32, image_shape: tuple[int, ...] = IMAGE
) -> Batch:
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (rows, *image_shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return Batch(image.to(dtype) / 127.5 - 1.0, labels, image)


class Batches:
    """A loader with a length: STEPS batches of fixed random images."""

    batch_size = ROWS

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        for step in range(STEPS):
            batch = tiny_batch(step, ROWS)
            yield batch.image, batch.labels


def network(seed: int = 7) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(tiny_blocks())


def gradients(modules: list[LocalModule]) -> dict[str, Tensor | None]:
    """Gradients of all parameters of blocks and heads, by a name that includes the module."""
    found: dict[str, Tensor | None] = {}
    for module in modules:
        parts = {**module.blocks, **{f"head.{name}": level for name, level in module.levels.items()}}
        for part, network in parts.items():
            for name, parameter in network.named_parameters():
                grad = parameter.grad
                found[f"{module.plan.index}.{part}.{name}"] = None if grad is None else grad.clone()
    return found


def without_updates(stage: Stage) -> Stage:
    """The same stage, but its schedule keeps the gradients instead of stepping the optimiser."""
    stage.schedule = tuple(action for action in stage.schedule if action.kind.value != "U")
    return stage
