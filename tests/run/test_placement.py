"""The weights do not depend on where modules run or how fast: 1, 2, 3 and 4 processes, with random delays."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers_spawn import run_ranks
from tiny import ROWS, STEPS, Batches, network, tiny_batch, tiny_config, tiny_stage, train_on

from pipeline import LoaderData, train
from pipeline.local.updates import update_together
from pipeline.local.weights import module_weights, weights_sha256
from pipeline.stage.schedule import Action

MODULES = 4
Case = tuple[str, str, int, int, str]  # method, variant, cascade span, micro-batches, schedule
CASES: list[Case] = [
    (method, variant, span, micro_batches, "exact")
    for method in ("dgl", "predsim", "infopro", "infopro-contrast", "greedy")
    for variant, span, micro_batches in (("plain", 1, 1), ("hpff", 2, 1), ("hpff", 2, 2))
] + [("infopro", "released", 2, 1, "exact"), ("infopro", "hpff", 3, 2, "exact"), ("dgl", "hpff", MODULES, 1, "exact")]
CASES += [
    ("infopro", "hpff", 2, 1, "async-1"),
    ("dgl", "hpff", 2, 2, "async-2"),
    ("infopro", "released", 2, 1, "async-1"),
    ("dgl", "hpff", 3, 1, "async-1"),
    ("dgl", "hpff", MODULES, 2, "async-1"),
]
LATE = CASES[-5:]  # late gradients must be applied before an epoch ends
DIFFERENT = len(CASES)
SAME = {  # a case that must give the weights of another
    ("dgl", "plain", 1, 1, "async-1"): ("dgl", "plain", 1, 1, "exact"),
    ("infopro", "plain", 1, 1, "async-3"): ("infopro", "plain", 1, 1, "exact"),
    ("infopro", "hpff", 2, 2, "async-0"): ("infopro", "hpff", 2, 2, "exact"),
}
CASES += SAME


def dawdle(rank: int) -> Any:
    """Sleep a random 0 to 2 ms before every action: another interleaving in every run."""
    generator = random.Random(time.time_ns() + rank)

    def before_action(step: int, action: Action) -> None:
        time.sleep(generator.random() * 0.002)

    return before_action


def config_of(case: Case) -> Any:
    method, variant, span, micro_batches, name = case
    kind, _, delay = name.partition("-")
    schedule = {"micro_batches": micro_batches, "kind": kind, "delay": int(delay or 1)}
    train = {"epochs": 2 if case in LATE else 1}
    checkpoint = {"every_epochs": 0}
    return tiny_config(method, variant, span, MODULES, schedule=schedule, train=train, checkpoint=checkpoint)


def train_all(rank: int, cases: list[Case], folder: str) -> list[str]:
    """Every case, one after another in the same processes; returns the weights' digests."""
    digests = []
    for index, case in enumerate(cases):
        summary = train(
            config_of(case),
            network=network(),
            data=LoaderData(Batches(), [next(iter(Batches()))]),  # the tests are not what is compared
            run_dir=Path(folder) / str(index),
            quiet=True,
            before_action=dawdle(rank),
        )
        assert summary["world_size"] >= 1 and summary["steps"] == STEPS * summary["epochs"]
        digests.append(summary["weights_sha256"])
    return digests


@pytest.fixture(scope="module")
def digests() -> dict[int, list[str]]:
    """The digests of all cases by number of processes."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        jobs = {
            ranks: pool.submit(run_ranks, train_all, ranks, CASES, f"{folder}/{ranks}", timeout_s=300)
            for ranks in (1, 2, 3, 4)
        }
    for ranks, job in jobs.items():
        for result in job.result():
            assert result.exit_code == 0, result.stderr
            assert result.value == job.result()[0].value
        found[ranks] = job.result()[0].value
    return found


ALL = [pytest.param(0, marks=pytest.mark.alone), *range(1, len(CASES))]  # the first one runs all cases


@pytest.mark.parametrize("index", ALL, ids=lambda i: "-".join(map(str, CASES[i])))
def test_weights_are_the_same_on_any_number_of_processes(digests: dict[int, list[str]], index: int) -> None:
    assert len({digests[ranks][index] for ranks in (1, 2, 3, 4)}) == 1


def test_different_methods_have_different_weights(digests: dict[int, list[str]]) -> None:
    """The digest sees the weights: no two cases agree by accident."""
    assert len(set(digests[1][:DIFFERENT])) == DIFFERENT


@pytest.mark.parametrize("case", SAME, ids=lambda case: "-".join(map(str, case)))
def test_async_is_exact_without_a_cascade_or_a_delay(digests: dict[int, list[str]], case: Case) -> None:
    assert digests[4][CASES.index(case)] == digests[1][CASES.index(SAME[case])]


@pytest.mark.parametrize("method", ["dgl", "infopro"])
@pytest.mark.parametrize("span", [1, 2])
def test_two_micro_batches_equal_gradient_accumulation(method: str, span: int) -> None:
    """M = 2: the same weights as two half batches in turn, whose gradients are added before the update."""
    whole, modules, _ = tiny_stage(tiny_config(method, "hpff", span, MODULES, schedule={"micro_batches": 2}))
    halves, reference, _ = tiny_stage(tiny_config(method, "hpff", span, MODULES))
    halves.schedule = tuple(action for action in halves.schedule if action.kind.value != "U")
    for step in range(3):
        batch = tiny_batch(step, ROWS)
        train_on(whole, 1, step, batch)
        for start in (0, ROWS // 2):
            part = slice(start, start + ROWS // 2)
            half = type(batch)(batch.x[part], batch.labels[part], batch.image[part])
            train_on(halves, 1, step, half)
        for module in reference:
            for parameter in itertools.chain(module.parameters, *[lv.parameters() for lv in module.levels.values()]):
                if parameter.grad is not None:
                    parameter.grad /= 2
        update_together([(module, step) for module in reference])
    assert weights_sha256(list(map(module_weights, modules))) == weights_sha256(list(map(module_weights, reference)))
