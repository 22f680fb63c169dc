"""What a user can get wrong ends all ranks with one line before training, or is simply right (a short last batch)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import line_of
from helpers_spawn import RankResult, run_ranks
from PIL import Image

from pipeline import load_config, train

pytestmark = pytest.mark.long

IMAGES = 18  # of two classes; 4 in a batch: the last one has 2


def write_images(root: Path, split: str, classes: list[str], count: int) -> None:
    for index in range(count):
        path = root / split / classes[index % len(classes)] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(index)
        Image.fromarray(torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()).save(path)


def job(rank: int, folder: str, assignments: list[str]) -> dict[str, Any]:
    settings = [
        "model.name=resnet20",
        "model.modules=2",
        "method.name=dgl",
        "data.name=folder",
        f"data.root={folder}/data",
        "data.batch_size=4",
        "train.epochs=1",
        "runtime.device=cpu",
        "runtime.threads=1",
        "runtime.deadline_s=20",
        "log.curve=false",
    ]
    config = load_config(assignments=[*settings, *assignments])
    return train(config, run_dir=Path(folder) / "run", quiet=True)


def run(tmp_path: Path, ranks: int = 2, *assignments: str) -> list[RankResult]:
    return run_ranks(job, ranks, str(tmp_path), list(assignments), timeout_s=60.0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_images(tmp_path / "data", "train", ["cat", "dog"], IMAGES)
    write_images(tmp_path / "data", "test", ["cat", "dog"], 6)
    return tmp_path / "data"


def break_an_image(data: Path) -> None:
    (data / "train" / "dog" / "1.png").write_bytes(b"\\x89PNG but not really")


def add_a_test_class(data: Path) -> None:
    write_images(data, "test", ["owl"], 1)


def empty_the_test(data: Path) -> None:
    for path in (data / "test").rglob("*.png"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_an_image, ["1.png"]),
        (add_a_test_class, ["owl"]),
        (empty_the_test, ["test"]),
        (lambda data: data.rename(data.with_name("elsewhere")), ["data.root", "data"]),
    ],
)
def test_broken_data_is_named_before_training(
    tmp_path: Path, data: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    damage(data)
    results = run(tmp_path)
    assert all(result.exit_code != 0 for result in results)
    line = line_of(results)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_short_last_batch_is_trained_on(tmp_path: Path, data: Path) -> None:
    results = run(tmp_path)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    assert results[0].value["steps"] == 5  # 4 of four images, one of two


@pytest.mark.parametrize(
    ("ranks", "assignment", "words"),
    [
        (3, "train.epochs=1", ["3 processes for 2 local modules"]),
        (2, "runtime.device=cuda", ["runtime.device = 'cuda'", "GPUs"]),
        (2, "model.modules=40", ["model.modules = 40"]),
        (2, "method.name=infopro patches.grid=99", ["patches.grid = 99", "use at most"]),
        (2, "data.name=cifar10", ["data.root", "cifar10"]),
    ],
)
def test_a_job_that_cannot_be_placed_is_refused(
    tmp_path: Path, data: Path, ranks: int, assignment: str, words: list[str]
) -> None:
    if assignment == "runtime.device=cuda" and torch.cuda.device_count() >= ranks:
        pytest.skip("there are enough GPUs")
    results = run(tmp_path, ranks, *assignment.split())
    assert all(result.exit_code != 0 for result in results)
    assert all(word in line_of(results) for word in words)


def job_at_port(rank: int, folder: str, port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    job(rank, folder, ["runtime.deadline_s=2"])


def test_a_port_that_is_taken_is_named(tmp_path: Path, data: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        results = run_ranks(job_at_port, 2, str(tmp_path), port, timeout_s=60.0)
    assert all(result.exit_code != 0 for result in results)
    lines = [line for line in results[0].stderr.splitlines() if line.startswith("localpipe:")]
    assert len(lines) == 1 and f"MASTER_PORT = {port}: the port is taken on this machine" in lines[0]
