"""Where modules run: by count, measured or given. Never a question of results, and refused before any step."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from tiny import CLASSES, IMAGE, Batches, network, tiny_blocks, tiny_config
from torch import Tensor, nn

from pipeline import ConfigError, LoaderData, train
from pipeline.base.numerics import Numerics
from pipeline.local.task import Classification
from pipeline.plan import measured_placement
from pipeline.plan.profiling import profile_modules
from pipeline.ranks.team import Team

KINDS: dict[str, dict[str, Any]] = {
    "auto": {"kind": "auto"},
    "count": {"kind": "count"},
    "given": {"kind": "given", "stages": [3, 1]},
    "measured": {"kind": "measured", "steps": 2},
}
CPU = Numerics(torch.device("cpu"), torch.float32, False)


def train_all(rank: int, folder: str) -> dict[str, str]:
    return {
        name: train(
            tiny_config("infopro", "hpff", 2, 4, partition=partition, train={"epochs": 1}),
            network=network(),
            data=LoaderData(Batches(), Batches()),
            run_dir=Path(folder) / name,
            quiet=True,
        )["weights_sha256"]
        for name, partition in KINDS.items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Any]]:
    """Digests of the weights and the stored plans, by kind."""
    folder = tmp_path_factory.mktemp("kinds")
    results = run_ranks(train_all, 2, str(folder), timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    return results[0].value, {name: json.loads((folder / name / "plan.json").read_text()) for name in KINDS}


def test_the_placement_does_not_change_the_weights(runs: tuple[dict[str, str], dict[str, Any]]) -> None:
    assert len(set(runs[0].values())) == 1


def test_the_plan_is_stored(runs: tuple[dict[str, str], dict[str, Any]]) -> None:
    plans = runs[1]
    assert plans["count"]["stages"] == [2, 2]
    assert plans["given"]["stages"] == [3, 1]
    assert sum(plans["auto"]["stages"]) == 4 and plans["auto"]["partition"] == "auto"
    assert sum(plans["measured"]["stages"]) == 4 and plans["measured"]["partition"] == "measured"
    assert plans["given"]["modules"][0] == ["stem", "a"] and plans["given"]["schedules"][1].startswith("F3.0 L3.0")


@pytest.mark.parametrize(("ranks", "stages"), [(1, [4]), (2, [3, 1]), (3, [1, 2, 1]), (4, [1, 1, 1, 1])])
def test_flops_are_counted_where_the_ranks_leave_a_choice(
    ranks: int, stages: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_placement, "module_flops", lambda *_: [10, 10, 10, 40])
    team = SimpleNamespace(size=ranks, leads=True, broadcast=lambda value: value)
    config = tiny_config("dgl", "plain", 1, 4, partition=KINDS["auto"])
    plan, words = measured_placement.placed_plan(
        config, tiny_blocks(), Classification(CLASSES, IMAGE), CPU, SimpleNamespace(team=team)
    )
    assert [len(stage) for stage in plan.stages] == stages
    assert words.startswith("placement by FLOPs: ") == (1 < ranks < 4)
    if ranks == 2:
        assert words == "placement by FLOPs: 43 | 57 % of a step (by count 71 % on the busiest rank)"


class Chooses(nn.Module):
    """A block that looks at its input: it trains, but no step of it can be done without values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def train_what_chooses(rank: int, folder: str) -> tuple[list[int], str]:
    first, *others = network()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train(
            tiny_config("dgl", "plain", 1, 4, partition=KINDS["auto"], train={"max_steps": 2}),
            network=nn.Sequential(first, Chooses(), *others),
            data=LoaderData(Batches(), Batches()),
            run_dir=folder,
        )
    return json.loads((Path(folder) / "plan.json").read_text())["stages"], said.getvalue()


def test_what_cannot_be_counted_trains_placed_by_count(tmp_path: Path) -> None:
    results = run_ranks(train_what_chooses, 2, str(tmp_path / "run"), timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    stages, said = results[0].value
    assert stages == [2, 2]
    assert re.search(r"^ *placement by count: local module \d \(.*\) cannot be counted without values \(", said, re.M)


def one_rank() -> Any:
    return SimpleNamespace(team=Team(), local_world_size=1)


def test_a_plan_larger_than_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a measured module is real; only the size of the device is made up."""
    monkeypatch.setattr("pipeline.plan.profiling.device_memory", lambda device, sharing=1: 2**16)
    config = tiny_config("dgl", "plain", 1, 4, partition=KINDS["measured"])
    with pytest.raises(ConfigError, match="rank 0 needs .* GiB, its device has .* start more processes"):
        measured_placement.placed_plan(config, tiny_blocks(), Classification(CLASSES, IMAGE), CPU, one_rank())


def test_measuring_leaves_the_network_and_the_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = tiny_blocks()
    before = {f"{n}.{k}": v.clone() for n, block in blocks.items() for k, v in block.state_dict().items()}
    state = torch.get_rng_state()
    seen = []
    monkeypatch.setattr(measured_placement, "profile_modules", lambda *a: seen.append(profile_modules(*a)) or seen[-1])
    config = tiny_config("infopro", "hpff", 2, 4, partition=KINDS["measured"])
    measured_placement.placed_plan(config, blocks, Classification(CLASSES, IMAGE), CPU, one_rank())
    assert len(seen[0].modules) == 4
    assert torch.equal(torch.get_rng_state(), state)
    for name, block in blocks.items():
        for key, value in block.state_dict().items():
            assert torch.equal(value, before[f"{name}.{key}"]), f"{name}.{key}"


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ({"kind": "given"}, "stages belong to kind 'given'"),
        ({"kind": "auto", "stages": [2, 2]}, "stages belong to kind 'given'"),
        ({"kind": "count", "stages": [2, 2]}, "stages belong to kind 'given'"),
        ({"kind": "given", "stages": [2, 0]}, "each must be at least 1"),
        ({"kind": "balanced"}, "partition.kind = 'balanced' is not known"),
    ],
)
def test_a_partition_that_makes_no_sense_is_refused(partition: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_config("dgl", "plain", 1, 4, partition=partition)
