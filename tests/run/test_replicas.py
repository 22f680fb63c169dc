"""Replicas x stages: 2 x 2 trains as 1 x 2 and 4 x 1 do, on the same batches, and saves once for all."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import twins_on_device
from helpers_spawn import run_ranks
from tiny import CLASSES, IMAGE, tiny_blocks, tiny_config
from torch import Tensor, nn

from pipeline import ConfigError, LoaderData, train
from pipeline.base.numerics import Numerics
from pipeline.base.validation import validate, with_values
from pipeline.local.task import Classification
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.ranks.grid import Grid, grid_of

ROWS = 12
UNEVEN = (15, 13)
"""Rows of batches that no four replicas have equal parts of."""
LATE = {"kind": "async"}
ADDED_UP = {"epochs": 2, "accumulate": 2, "ema": 0.5}
SPOILT = {"epochs": 2, "nonfinite": "skip"}
METHODS: dict[str, dict[str, Any]] = {
    "weights upstream": {
        "method": {"front": "man++", "average": 0.5},
        "schedule": LATE,
        "optim": {"error_feedback": True},
    },
    "gradients downstream": {"method": {"reconciliation": 0.01}, "hierarchy": {"cascade_span": 1}},
}
"""Methods with messages of their own."""


class Block(nn.Module):
    """A convolution and GroupNorm, which sees one image at a time, with a shortcut where that fits."""

    def __init__(self, given: int, width: int, stride: int = 1, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(given, width, 3, stride, 1)
        self.norm = nn.GroupNorm(2, width) if norm is None else norm(width)
        self.shortcut = (given, 1) == (width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.conv(x)))
        return x + y if self.shortcut else y


def network(norm: type[nn.Module] | None = None, seed: int = 7) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            stem=Block(3, 4, 1, norm), a=Block(4, 4, 1, norm), b=Block(4, 6, 2, norm), c=Block(6, 6, 1, norm),
            classifier=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
        )
    )  # fmt: skip


class Images:
    """Batches of noise in another order in every epoch, the last one short; ``spoilt``: one has a NaN at its end."""

    def __init__(self, rows: tuple[int, ...], spoilt: bool = False) -> None:
        self.batch_size = max(rows)
        self._rows = rows
        self._spoilt = spoilt

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Any:
        for number in torch.randperm(len(self._rows)).tolist():
            generator = torch.Generator().manual_seed(number)
            rows = self._rows[number]
            images = torch.rand(rows, 3, 8, 8, generator=generator)
            if self._spoilt and number == 1:
                images[-1, 0, 0, 0] = torch.nan
            yield images, torch.randint(CLASSES, (rows,), generator=generator)


def run(
    folder: Path,
    replicas: int | str,
    norm: type[nn.Module] | None = None,
    seed: int = 7,
    resume: str = "auto",
    batches: tuple[int, ...] = (12, 12, 9),
    method: dict[str, Any] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """A short run on this rank, and its summary."""
    sections["parallel"] = {"replicas": replicas, **sections.get("parallel", {})}
    sections.setdefault("train", {"epochs": 2})
    config = tiny_config("greedy", "plain", 2, 4, data={"batch_size": max(batches)}, **sections)
    config = validate(with_values(config, {f"method.{key}": value for key, value in (method or {}).items()}))
    data = LoaderData(Images(batches, sections["train"].get("nonfinite") == "skip"), Images((5, 12, 3)))
    with contextlib.redirect_stdout(io.StringIO()):
        return train(config, network=network(norm, seed), data=data, run_dir=folder, quiet=True, resume=resume)


def on_four(rank: int, folder: str) -> dict[str, str]:
    here = Path(folder)
    for name, replicas in {"2 x 2": 2, "4 x 1": 4, "1 x 4": 1}.items():
        run(here / name, replicas, seed=7 + rank // (4 // replicas))  # the first replica's weights count
    run(here / "added up 2 x 2", 2, train=ADDED_UP)
    run(here / "spoilt 2 x 2", 2, train=SPOILT)
    for name, sections in METHODS.items():
        run(here / f"{name} 2 x 2", 2, **sections)
    run(here / "uneven 4 x 1", "auto", batches=UNEVEN, parallel={"stages": 1})
    run(here / "resumed", 2, train={"max_steps": 2})
    run(here / "stopped", 2, nn.BatchNorm2d, train={"max_steps": 4})
    found = {name: run(here / name, 2, nn.BatchNorm2d) for name in ("whole", "stopped")}
    late = {"schedule": LATE, "checkpoint": {"every_steps": 2, "keep": 9}}
    found["late"] = run(here / "late 2 x 2", 2, **late)
    saved = str(here / "late 2 x 2" / "checkpoints" / "step-00000002")
    found["late, resumed"] = run(here / "late, resumed", 2, resume=saved, seed=8, **late)
    return {name: summary["weights_sha256"] for name, summary in found.items()}


def on_two(rank: int, folder: str) -> None:
    for name, replicas in {"1 x 2": 1, "2 x 1": 2}.items():
        run(Path(folder) / name, replicas)
    run(Path(folder) / "added up 1 x 2", 1, train=ADDED_UP)
    run(Path(folder) / "spoilt 1 x 2", 1, train=SPOILT)
    run(Path(folder) / "uneven 1 x 2", 1, batches=UNEVEN)
    for name, sections in METHODS.items():
        run(Path(folder) / f"{name} 1 x 2", 1, **sections)
    run(Path(folder) / "resumed", 1, train={"max_steps": 4}, seed=8)  # other weights, which the checkpoint replaces
    saved = str(Path(folder) / "late 2 x 2" / "checkpoints" / "step-00000002")
    run(Path(folder) / "late 1 x 2", 1, schedule=LATE)
    run(Path(folder) / "late, then 1 x 2", 1, schedule=LATE, resume=saved, seed=8)


def on_four_again(rank: int, folder: str) -> dict[str, Any]:
    run(Path(folder) / "resumed", 4, seed=8)
    return twins_on_device.on_device(folder)


@dataclass(frozen=True)
class Runs:
    """What the ranks have left in ``folder``; ``digests`` by name of the run; what each has seen on a device that is
    none."""

    folder: Path
    digests: dict[str, str]
    on_device: list[dict[str, Any]]

    def weights(self, name: str) -> dict[str, Tensor]:
        states = [torch.load(self.folder / name / f"{part}.pt", weights_only=True) for part in ("model", "heads")]
        return states[0] | states[1]

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("replicas")
    digests: dict[str, str] = {}
    for function, ranks in ((on_four, 4), (on_two, 2), (on_four_again, 4)):
        results = run_ranks(function, ranks, str(folder), timeout_s=120)
        assert [result.exit_code for result in results] == [0] * ranks, [result.stderr for result in results]
        if function is on_four:
            digests = results[0].value
    return Runs(folder, digests, [result.value for result in results])


@pytest.mark.parametrize("name", ["2 x 2", "4 x 1", "2 x 1"])
def test_replicas_end_with_the_weights_of_one_pipeline_on_the_same_batches(runs: Runs, name: str) -> None:
    expected, found = runs.weights("1 x 2"), runs.weights(name)
    begun = network().state_dict()
    assert not torch.allclose(expected["a.conv.weight"], begun["a.conv.weight"], atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_methods_with_messages_of_their_own_train_as_one_pipeline_does(runs: Runs, name: str) -> None:
    expected, plain = runs.weights(f"{name} 1 x 2"), runs.weights("1 x 2")
    assert not torch.allclose(expected["c.conv.weight"], plain["c.conv.weight"], atol=1e-4)
    torch.testing.assert_close(runs.weights(f"{name} 2 x 2"), expected, rtol=1e-4, atol=1e-5)


def test_as_many_replicas_as_there_are_need_not_divide_a_batch(runs: Runs) -> None:
    """A job of four machines that has lost one goes on with three, at the same batch."""
    torch.testing.assert_close(runs.weights("uneven 4 x 1"), runs.weights("uneven 1 x 2"), rtol=1e-4, atol=1e-5)
    for found, expected in zip(runs.records("uneven 4 x 1"), runs.records("uneven 1 x 2"), strict=True):
        assert found["images"] == expected["images"] == sum(UNEVEN)
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)


def test_gradients_of_several_batches_and_averages_of_weights_are_those_of_one_pipeline(runs: Runs) -> None:
    expected, found = runs.weights("added up 1 x 2"), runs.weights("added up 2 x 2")
    assert not torch.allclose(expected["a.conv.weight"], runs.weights("1 x 2")["a.conv.weight"], atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(runs.records("added up 1 x 2"), runs.records("added up 2 x 2"), strict=True):
        assert other["ema_metrics"] == pytest.approx(one["ema_metrics"], rel=1e-4)
        assert other["ema_metrics"]["loss"] != other["test_loss"]


def test_stages_of_a_replica_change_no_bit(runs: Runs) -> None:
    torch.testing.assert_close(runs.weights("2 x 2"), runs.weights("2 x 1"), rtol=0, atol=0)
    torch.testing.assert_close(runs.weights("1 x 4"), runs.weights("1 x 2"), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [twins_on_device.EXACT, twins_on_device.LATE])
def test_sums_on_a_device_and_messages_never_wait_for_each_other(runs: Runs, kind: str) -> None:
    """As on NCCL, while every rank waits for all of its device before every action: the run ends, with the weights of
    the CPU to the bit. Gradients are summed before they are used and not written meanwhile, those of graphs neither."""
    assert runs.on_device[0][f"{kind}, device"][0] == runs.on_device[0][kind]
    for rank in runs.on_device:
        _, races, waits_in_step, replays = rank[f"{kind}, device"]
        assert (races, waits_in_step) == ([], {}) and bool(replays) == (kind == twins_on_device.EXACT)


def test_metrics_are_those_of_the_whole_batch_and_test_told_once(runs: Runs) -> None:
    for name in ("2 x 2", "4 x 1"):
        for found, expected in zip(runs.records(name), runs.records("1 x 2"), strict=True):
            assert found["images"] == expected["images"] == 33 and found["test_error_pct"] == expected["test_error_pct"]
            for key in ("train_loss", "test_loss"):
                assert found[key] == pytest.approx(expected[key], rel=1e-4)
            losses = [[module["losses"] for module in record["modules"]] for record in (found, expected)]
            assert [pytest.approx(of_module, rel=1e-4) for of_module in losses[1]] == losses[0]
            assert [module["index"] for module in found["modules"]] == [0, 1, 2, 3]
    last = runs.records("2 x 2")[-1]
    assert [(stage["rank"], stage["modules"]) for stage in last["stages"]] == [
        (0, [0, 1]), (1, [2, 3]), (2, [0, 1]), (3, [2, 3])
    ]  # fmt: skip
    parameters = sum(value.numel() for value in runs.weights("4 x 1").values())
    (sent,) = {stage["bytes_sent"] for stage in runs.records("4 x 1")[-1]["stages"]}
    assert sent == pytest.approx(3 * 2 * 3 / 4 * 4 * parameters, rel=0.05)  # 3 steps; the losses besides


def test_a_checkpoint_goes_on_with_any_replicas_and_stages(runs: Runs) -> None:
    """2 x 2, then 1 x 2, then 4 x 1; a module has one file, whoever has written it."""
    torch.testing.assert_close(runs.weights("resumed"), runs.weights("1 x 2"), rtol=1e-4, atol=1e-5)
    newest = max((runs.folder / "resumed" / "checkpoints").iterdir())
    assert sorted(path.name for path in newest.glob("module-*")) == [f"module-00{m}.safetensors" for m in range(4)]


def test_what_is_not_finite_in_one_replica_is_left_out_in_all(runs: Runs) -> None:
    torch.testing.assert_close(runs.weights("spoilt 2 x 2"), runs.weights("spoilt 1 x 2"), rtol=1e-4, atol=1e-5)
    for name in ("spoilt 2 x 2", "spoilt 1 x 2"):
        assert [module["skipped_steps"] for module in runs.records(name)[0]["modules"]] == [1] * 4
        assert all(value.isfinite().all() for value in runs.weights(name).values())


def test_gradients_on_their_way_are_saved_by_every_replica(runs: Runs) -> None:
    """Schedule async, in the middle of an epoch: to the bit on as many replicas, to rounding on others."""
    assert runs.digests["late, resumed"] == runs.digests["late"]
    assert not torch.equal(runs.weights("late 1 x 2")["a.conv.weight"], runs.weights("1 x 2")["a.conv.weight"])
    for name in ("late 2 x 2", "late, then 1 x 2"):
        torch.testing.assert_close(runs.weights(name), runs.weights("late 1 x 2"), rtol=1e-4, atol=1e-5)
    saved = runs.folder / "late 2 x 2" / "checkpoints" / "step-00000002"
    parts = sorted(path.name for path in saved.glob("*replica*"))
    assert parts == [f"module-00{module}.replica-1.safetensors" for module in range(2)]  # those that wait


def test_running_statistics_are_the_same_on_all_replicas_so_one_saves_for_all(runs: Runs) -> None:
    assert runs.digests["stopped"] == runs.digests["whole"]


@pytest.mark.parametrize(
    ("sections", "size", "line"),
    [
        ({}, 3, "parallel.replicas = 2 with 3 processes: every replica is a pipeline of as many; start 2 or 4"),
        ({}, 1, "parallel.replicas = 2 with 1 process: every replica is a pipeline of as many; start 2 processes"),
        ({"parallel": {"stages": 4}}, 4, "parallel.replicas = 2 x parallel.stages = 4 with 4 processes; start 8"),
        ({"parallel": {"replicas": "auto", "stages": 2}}, 3, "parallel.stages = 2 with 3 processes, which are no"),
        ({"parallel": {"replicas": "auto", "stages": 1}}, 7, "data.batch_size = 12 with parallel.replicas = 7 leaves"),
    ],
)  # fmt: skip
def test_processes_that_are_no_replicas_are_refused(sections: dict[str, Any], size: int, line: str) -> None:
    config = tiny_config(data={"batch_size": ROWS}, **{"parallel": {"replicas": 2} | sections.get("parallel", {})})
    with pytest.raises(ConfigError, match="^" + re.escape(line)):
        grid_of(config, 0, size)


def test_a_job_of_a_wrong_size_prints_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^parallel\.replicas = 2 with 1 process"):
        run(tmp_path, 2)


def test_the_place_of_a_rank() -> None:
    config = tiny_config(data={"batch_size": ROWS}, parallel={"replicas": "auto", "stages": 2})
    grid = grid_of(config, 5, 6)
    assert (grid.replicas, grid.stages, grid.replica, grid.stage) == (3, 2, 2, 1)
    assert list(grid.twins(1)) == [1, 3, 5] and not grid.leads
    assert grid.named("module 3 (c)") == "replica 2, module 3 (c)"
    assert Grid(1, 1, 2).named("module 3 (c)") == "module 3 (c)"


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"data": {"batch_size": 9}}, "data.batch_size = 9 is not divisible by parallel.replicas = 2; use"),
        ({"schedule": {"micro_batches": 4}}, "data.batch_size = 12 is not divisible by parallel.replicas = 2 x s"),
        ({"data": {"batch_size": 2}}, "data.batch_size = 2 with parallel.replicas = 2 leaves BatchNorm one image"),
        ({"schedule": {"kind": "free"}}, "parallel.replicas = 2 with schedule.kind = 'free', where the stages of two"),
        ({"parallel": {"sync_batch_norm": True}}, "parallel.sync_batch_norm = true with runtime.device = 'cpu': torch"),
        ({"parallel": {"replicas": "auto"}}, "parallel.replicas = 'auto' with parallel.stages = 0: set parallel"),
        ({"parallel": {"replicas": 1, "sync_batch_norm": True}}, "parallel.sync_batch_norm = true with one replica"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_replicas_is_refused(sections: dict[str, dict[str, Any]], line: str) -> None:
    parallel = {"replicas": 2} | sections.pop("parallel", {})
    with pytest.raises(ConfigError, match="^" + re.escape(line)):
        tiny_config(**{"data": {"batch_size": ROWS}, **sections, "parallel": parallel})


def test_batch_norm_over_all_replicas_is_not_differentiated_twice() -> None:
    config = tiny_config(parallel={"replicas": 2, "sync_batch_norm": True}, runtime={"device": "auto"})
    with pytest.raises(ConfigError, match=r"^parallel\.sync_batch_norm = true with method\.reconciliation = 0\.1: "):
        validate(with_values(config, {"method.reconciliation": 0.1}))


def test_batch_norm_over_all_replicas_is_that_of_torch() -> None:
    """It runs on GPUs only; here it is put in the place of every BatchNorm, on the same weights."""
    group: Any = object()
    parallel = {"replicas": 2, "sync_batch_norm": True}
    config = tiny_config("dgl", "plain", 1, 3, parallel=parallel, runtime={"device": "auto"})
    plan = make_plan(config, tiny_blocks(), Classification(CLASSES, IMAGE), 1, replicas=2)
    blocks = tiny_blocks()
    weights = [parameter for block in blocks.values() for parameter in block.parameters()]
    numerics = Numerics(torch.device("cpu"), torch.float32, False)
    modules = build_modules(plan, 0, blocks, numerics, False, None, 1, group)
    layers = [layer for module in modules for part in (*module.blocks.values(), *module.levels.values())
              for layer in part.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]  # fmt: skip
    assert layers and all(type(layer) is nn.SyncBatchNorm and layer.process_group is group for layer in layers)
    assert list(map(id, weights)) == [id(parameter) for module in modules for parameter in module.parameters]
