"""The released code's numbers, reproduced by one forward per module: losses, gradients, BatchNorm statistics.

The vectors lie in the directory named by LOCALPIPE_GOLDEN.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import without_updates
from torch import Tensor, nn

from pipeline.assembly import build_modules, make_plan
from pipeline.backbones import build_blocks
from pipeline.config import from_dict, validate
from pipeline.local_module import LocalModule
from pipeline.methods import Task
from pipeline.numerics import Numerics
from pipeline.stage import Batch, Links, Stage

TOLERANCE = 2e-5
MEAN = torch.tensor([125.3, 123.0, 113.9]).view(1, 3, 1, 1) / 255
STD = torch.tensor([63.0, 62.1, 66.7]).view(1, 3, 1, 1) / 255
CASES = ("hpff_resnet32_K4_stress", "infopro_resnet32_K4_cross_entropy", "infopro_resnet32_K4_contrast")


@pytest.fixture(scope="module")
def golden() -> Path:
    directory = os.environ.get("LOCALPIPE_GOLDEN", "")
    if not directory or not (Path(directory) / "index.json").is_file():
        pytest.skip("set LOCALPIPE_GOLDEN to the directory of the golden vectors (index.json) to run this test")
    return Path(directory)


def network_name(block: str, parameter: str) -> str:
    """Our block and parameter name -> the released code's name, with fc for the classifier."""
    if block == "stem":
        return parameter
    if block == "classifier":
        return parameter
    return f"{block}.{parameter}"


def head_name(module: LocalModule, level: str, term: str, separate: bool, hpff: bool, rest: str) -> str:
    """``heads.Q.decoder.I.weight`` of a level -> the released code's name of that head."""
    stage, block = re.fullmatch(r"layer(\d)\.(\d)", list(module.blocks)[-1]).groups()  # type: ignore[union-attr]
    quadrant, kind, index, leaf = re.fullmatch(r"heads\.(\d)\.(decoder|head)\.(\d+)\.(\w+)", rest).groups()  # type: ignore[union-attr]
    if hpff:
        prefix = {"reconstruction": "aux_decoder", "task": "aux_classifier"}[term]
        prefix = "net_classifier" if level == "independent" else prefix
    else:
        prefix = {"reconstruction": "decoder", "task": "aux_classifier"}[term]
    inside = f"decoders.{quadrant}" if separate else kind
    return f"{prefix}_{stage}_{block}.{inside}.{index}.{leaf}"


def named_tensors(modules: list[LocalModule], hpff: bool) -> dict[str, Tensor]:
    """Every parameter and buffer under the released code's name."""
    found: dict[str, Tensor] = {}
    for module in modules:
        for block, network in module.blocks.items():
            for name, tensor in (*network.named_parameters(), *network.named_buffers()):
                found[network_name(block, name)] = tensor
        for level, heads in module.levels.items():
            for term, head in heads.heads():
                for name, tensor in (*head.named_parameters(), *head.named_buffers()):
                    found[head_name(module, level, term, head.separate, hpff, name)] = tensor
    if hpff:  # the released HPFF trains the layer fc64 and leaves fc unused
        found = {name.replace("fc.", "fc64."): tensor for name, tensor in found.items()}
    return found


def build(meta: dict[str, Any]) -> list[LocalModule]:
    hpff = meta["code"].startswith("HPFF")
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "resnet32", "modules": 4, "cuts": "equal"},
        "method": {
            "name": "infopro-contrast" if meta["mode"] == "contrast" else "infopro",
            "head": meta["aux_net_config"],
            "feature_dim": meta["feature_dim"],
            "reconstruction": [meta["ixx_1"], meta["ixx_2"]],
            "task": [meta["ixy_1"], meta["ixy_2"]],
        },
        "data": {"batch_size": 32},
    }
    if hpff:
        values["hierarchy"] = {
            "cascade_span": 2,
            "variant": "released",
            "independent_weight": meta["wx"],
            "cascade_weight": meta["wy"],
        }
        values["patches"] = {"grid": 2}
    config = validate(from_dict(values))
    blocks = build_blocks("resnet32", 3, 10)
    plan = make_plan(config, blocks, Task(10, (3, 32, 32)), 1)
    return build_modules(plan, 0, blocks, Numerics(torch.device("cpu"), torch.float32, False), fresh=True)


def relative(found: Tensor, expected: np.ndarray) -> float:
    reference = torch.from_numpy(expected).double()
    return float((found.double() - reference).norm() / reference.norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", CASES)
def test_released_numbers_are_reproduced(golden: Path, case: str) -> None:
    entry = json.loads((golden / "index.json").read_text())[case]
    vectors = np.load(golden / f"golden_{case}.npz")
    gradients = np.load(golden / f"golden_{case}_grads.npz")
    modules = build(entry["meta"])
    hpff = case.startswith("hpff")
    tensors = named_tensors(modules, hpff)
    unused = set(entry["grad_none"])
    given = {key.split("/", 1)[1] for key in vectors if key.startswith("param/")}
    trained = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    assert given - unused == trained
    with torch.no_grad():
        for key in vectors:
            if key.startswith(("param/", "buffer/")) and (name := key.split("/", 1)[1]) in tensors:
                tensors[name].copy_(torch.from_numpy(vectors[key]))

    x = torch.from_numpy(vectors["image"])
    labels = torch.from_numpy(vectors["target"])
    steps = modules[0].plan
    from pipeline.schedule import exact_schedule

    plans = [module.plan for module in modules]
    assert steps.index == 0
    stage = Stage(modules, exact_schedule(plans, range(4), 1), (), 1, Links(), forward_image=False)
    without_updates(stage).train_step(0, 0, Batch(x, labels, x * STD + MEAN))

    for name in sorted(trained):
        found, expected = tensors[name].grad, gradients[f"grad/{name}"]
        assert found is not None, name
        if re.search(r"decoders?(\.\d)?\.0\.bias$", name):  # exactly 0 in theory: a bias before BatchNorm
            assert float(found.abs().max()) < 1e-6, name
        elif not expected.any():
            assert not found.any(), name
        else:
            assert relative(found, expected) <= TOLERANCE, (name, relative(found, expected))
    compared = 0
    for key in vectors:
        if key.startswith("after/") and (name := key.split("/", 1)[1]) in tensors:
            assert relative(tensors[name], vectors[key]) <= TOLERANCE, name
            compared += 1
    assert compared > 90
    for module in modules:
        losses = module.take_losses(1)
        for loss_name, value in losses.items():
            if loss_name == "final":
                assert value == pytest.approx(float(vectors["loss"]) if not hpff else value, rel=TOLERANCE)
                continue
            level, term = loss_name.split(".")
            separate = hpff and term == "reconstruction"
            kind = "decoder" if term == "reconstruction" else "head"
            head = head_name(module, level, term, separate, hpff, f"heads.0.{kind}.0.weight").split(".")[0]
            assert value == pytest.approx(float(vectors[f"headloss/{head}"].reshape(())), rel=TOLERANCE)
