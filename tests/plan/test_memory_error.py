"""Out of memory: the message says what the rank holds and which settings make it smaller."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from tiny import Batches, network, tiny_batch, tiny_blocks, tiny_config, tiny_plan, tiny_stage, train_on

from pipeline import LoaderData, train
from pipeline.base.numerics import Numerics
from pipeline.plan.assembly import build_modules
from pipeline.plan.memory import explain_out_of_memory
from pipeline.stage.inlet import Batch
from pipeline.stage.schedule import Action

CUDA = (
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 139.72 GiB of which 3.25 GiB is "
    "free.\nProcess 4711 has 136.46 GiB memory in use."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "3145728 bytes. Error code 12 (Cannot allocate memory)"
)


def explain(error: BaseException, ranks: int = 2, modules: int = 3, **sections: dict[str, Any]) -> str | None:
    """What is said when rank 0 of a tiny run meets ``error``; None: it is no failed allocation."""
    span = 1 if sections.get("schedule", {}).get("kind") == "free" else 2
    plan = tiny_plan(tiny_config("dgl", "plain", span, modules, **sections), ranks)
    numerics = Numerics(torch.device("cpu"), torch.float32, False)
    built = build_modules(plan, 0, tiny_blocks(), numerics, fresh=True)
    explained = explain_out_of_memory(error, plan, 0, numerics, built)
    if explained is None:
        return None
    assert explained.__cause__ is error
    assert "\n" not in str(explained) and len(str(explained)) < 800
    return str(explained)


@pytest.mark.parametrize(
    ("error", "asked"),
    [(torch.OutOfMemoryError(CUDA), "20,992 MiB"), (RuntimeError(CPU), "3.0 MiB"), (MemoryError(), None)],
)
def test_failed_allocations_are_recognised(error: BaseException, asked: str | None) -> None:
    text = explain(error)
    assert text is not None and "module 0 (stem-a)" in text
    assert f"asked for {asked} more" in text if asked else "asked for" not in text


def test_other_errors_are_not() -> None:
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert explain(ValueError("can't allocate memory")) is None


def parts(text: str) -> dict[str, float]:
    """MiB by what they are for."""
    found = re.search(r"in MiB: (.*?);", text)
    assert found is not None
    return {name: float(count) for name, count in re.findall(r"([a-z ]+?) ([\d.]+)(?:, |$)", found[1])}


def test_what_is_held_is_counted() -> None:
    """Weights of one layer that outweighs all else; everything else follows from it."""
    side = 256
    megabyte = side * side * 3 * 3 * 4 / 2**20

    def blocks() -> Any:
        built = tiny_blocks()
        built["a"].extra = torch.nn.Conv2d(side, side, 3, bias=False)
        return built

    numerics = Numerics(torch.device("cpu"), torch.float32, False)
    for schedule, optim, copies, states in (({}, {}, 0, 1), ({"kind": "async", "delay": 2}, {"name": "adamw"}, 3, 2)):
        plan = tiny_plan(tiny_config("dgl", "plain", 2, 3, schedule=schedule, optim=optim), 3)
        built = build_modules(plan, 0, blocks(), numerics, fresh=True)
        held = parts(str(explain_out_of_memory(MemoryError(), plan, 0, numerics, built)))
        assert held["weights"] == held["gradients"] == pytest.approx(megabyte, abs=0.1)
        assert held["optimiser"] == pytest.approx(states * megabyte, abs=0.2)
        assert held.get("late copies of weights", 0) == pytest.approx(copies * megabyte, abs=0.2)
        assert held["heads"] < 0.1 and held["messages"] < 0.2


@pytest.mark.parametrize(
    ("options", "there", "absent"),
    [
        ({}, ["data.batch_size (now 8)", "micro_batches (now 1)", "processes (now 2)", "kind=measured"], ["exact"]),
        ({"ranks": 3}, ["data.batch_size"], ["processes", "measured"]),
        ({"schedule": {"kind": "async"}}, ["schedule.kind=exact"], ["schedule.ring"]),
        ({"schedule": {"kind": "free"}}, ["schedule.ring (now 4)"], ["micro_batches", "schedule.kind=exact"]),
        ({"schedule": {"micro_batches": 4}}, ["images at a time"], ["more schedule.micro_batches"]),
        ({"partition": {"kind": "measured"}}, ["processes (now 2)"], ["kind=measured"]),
    ],
)
def test_only_knobs_that_can_be_turned_are_named(options: dict[str, Any], there: list[str], absent: list[str]) -> None:
    text = explain(MemoryError(), **options)
    assert text is not None
    knobs = text.partition("Use ")[2]
    for word in there:
        assert word in text
    for word in absent:
        assert word not in knobs


def run_out(rank: int, what: str) -> str:
    """What is said when a tensor or a step needs more than 64 MiB beyond what this process has."""
    stage, modules, plan = tiny_stage(tiny_config("dgl", "hpff", 2))
    train_on(stage, 1, 0, tiny_batch())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)
    try:
        if what == "tensor":
            torch.empty(2**40)
        else:
            image = torch.zeros(1, 3, 8, 8).expand(2**20, 3, 8, 8)
            train_on(stage, 1, 1, Batch(image, torch.zeros(2**20, dtype=torch.int64), None))
    except Exception as error:
        return str(explain_out_of_memory(error, plan, 0, modules[0].numerics, modules) or repr(error))
    return "nothing"


@pytest.mark.parametrize("what", ["tensor", "step"])
def test_a_real_failure_on_the_cpu_is_explained(what: str) -> None:
    (result,) = run_ranks(run_out, 1, what, timeout_s=60)
    assert result.exit_code == 0, result.stderr
    assert result.value.startswith("out of memory on cpu, which was asked for "), result.value
    assert "modules 0-4 (stem-classifier)" in result.value and "data.batch_size" in result.value
    if what == "tensor":
        assert "asked for 4,194,304 MiB more" in result.value


def ask_for_too_much(rank: int, folder: str) -> None:
    """At step 2, rank 1 asks for more memory than a process can address."""

    def before_action(step: int, action: Action) -> None:
        if (rank, step) == (1, 2):
            torch.empty(2**46)

    train(
        tiny_config("dgl", "hpff", 2, 4),
        network=network(),
        data=LoaderData(Batches(), Batches()),
        run_dir=Path(folder) / "run",
        quiet=True,
        before_action=before_action,
    )


def test_all_ranks_end_with_one_line_that_says_what_the_rank_holds(tmp_path: Path) -> None:
    results = run_ranks(ask_for_too_much, 3, str(tmp_path), timeout_s=60)
    assert [result.exit_code for result in results] == [1, 1, 1], [result.stderr for result in results]
    lines = [line for result in results for line in result.stderr.splitlines() if line.startswith("localpipe:")]
    assert len(lines) == 1, lines
    assert "rank 1, module 1 (b), epoch 1 step 2: out of memory on cpu" in lines[0]
    assert "268,435,456 MiB more" in lines[0] and "a smaller data.batch_size (now 8)" in lines[0]
    traceback = (tmp_path / "run" / "failure-rank1.txt").read_text()
    assert "before_action" in traceback and "DefaultCPUAllocator" in traceback
