"""A user's ``DataLoader`` whose images are read by workers: processes of rank 0, which must not be taken for ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import RankResult, run_ranks
from tiny import ROWS, STEPS, network, tiny_batch, tiny_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline import LoaderData, train
from pipeline.stage.schedule import Action

pytestmark = pytest.mark.long

TWO: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork"}  # the fastest to start
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "two": TWO,
    "persistent": {**TWO, "persistent_workers": True},
    "pinned": {**TWO, "pin_memory": True},
}


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Fixed random images."""

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        batch = tiny_batch(index, 1)
        return batch.image[0], batch.labels[0]


class NoisyImages(Images):
    """Images with noise of the moment, from a worker's random numbers."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return image.float() / 255 + torch.randn(image.shape), label


def run(images: Images, folder: Path, options: dict[str, Any], epochs: int = 1, **more: Any) -> dict[str, Any]:
    """Epochs of five steps with a checkpoint after every three."""
    loader = DataLoader(images, batch_size=ROWS, shuffle=True, **options)
    tests = DataLoader(images, batch_size=ROWS, **options)
    config = tiny_config("dgl", "hpff", 2, 4, train={"epochs": epochs}, checkpoint={"every_steps": 3, "keep": 9})
    return train(config, network=network(), data=LoaderData(loader, tests), run_dir=folder, quiet=True, **more)


def with_workers(rank: int, folder: str, kinds: list[str]) -> tuple[list[str], int, int]:
    """A run for each of KINDS while the user's own signals come; weights, signals sent, signals handled."""
    sent = handled = 0

    def handle(number: int, frame: object) -> None:
        nonlocal handled
        handled += 1

    def before_action(step: int, action: Action) -> None:
        nonlocal sent
        os.kill(os.getpid(), signal.SIGUSR1)
        sent += 1

    signal.signal(signal.SIGUSR1, handle)
    weights = [
        run(Images(), Path(folder) / kind, KINDS[kind], before_action=before_action)["weights_sha256"] for kind in kinds
    ]
    return weights, sent, handled


@pytest.mark.parametrize(("ranks", "kinds"), [(2, ["none", "two", "pinned"]), (4, ["none", "two"])])
def test_workers_end_no_run_and_change_no_weights(tmp_path: Path, ranks: int, kinds: list[str]) -> None:
    results = run_ranks(with_workers, ranks, str(tmp_path), kinds, timeout_s=120)
    assert [result.exit_code for result in results] == [0] * ranks, [result.stderr for result in results]
    for result in results:
        weights, sent, handled = result.value
        assert len(weights) == len(kinds) and len(set(weights)) == 1
        assert sent == handled > 0  # the user's handlers run, and nobody else acts on the signals


def from_the_middle(rank: int, folder: str) -> list[tuple[str, str]]:
    """Weights of undisturbed runs, and of those that go on from their checkpoints within the second epoch. Random
    numbers of persistent workers go on from epoch to epoch, so their images are fixed."""
    weights = []
    for images, kind in ((NoisyImages(), "two"), (Images(), "persistent")):
        whole = run(images, Path(folder) / kind, KINDS[kind], epochs=2)
        middle = Path(folder) / kind / "checkpoints" / "step-00000009"
        torch.manual_seed(99)
        again = run(images, Path(folder) / f"{kind}-again", KINDS[kind], epochs=2, resume=str(middle))
        weights.append((whole["weights_sha256"], again["weights_sha256"]))
    return weights


def test_a_run_with_workers_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    results = run_ranks(from_the_middle, 2, str(tmp_path), timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    for whole, again in results[0].value:
        assert whole == again


# --- what goes wrong in a worker --------------------------------------------------------------------------------------


class BrokenImages(Images):
    """The 21st image cannot be read."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 20:
            raise ValueError("image 20 is broken\nand will remain so")
        return super().__getitem__(index)


class NotedImages(Images):
    """Every process that reads images leaves its pid in a directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        (self._folder / str(os.getpid())).touch()
        return super().__getitem__(index)


def with_a_broken_image(rank: int, folder: str) -> None:
    run(BrokenImages(), Path(folder) / "run", KINDS["two"])


def with_a_killed_worker(rank: int, folder: str) -> None:
    def before_action(step: int, action: Action) -> None:
        if rank == 0 and step == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    (Path(folder) / "pids").mkdir(exist_ok=True)
    images = NotedImages(Path(folder) / "pids")
    run(images, Path(folder) / "run", KINDS["persistent"], before_action=before_action)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def one_line(results: list[RankResult]) -> str:
    """What localpipe said; every rank has failed, none has waited for a deadline."""
    assert [result.exit_code for result in results] == [1] * len(results), [result.stderr for result in results]
    assert max(result.ended_s for result in results) < 20.0
    lines = [line for result in results for line in result.stderr.splitlines() if line.startswith("localpipe:")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_worker_whose_data_set_raises(tmp_path: Path, ranks: int) -> None:
    line = one_line(run_ranks(with_a_broken_image, ranks, str(tmp_path)))
    assert line.startswith("localpipe: rank 0, ")
    assert "the train loader failed: ValueError: image 20 is broken and will remain so (traceback: " in line
    assert "in __getitem__" in (tmp_path / "run" / "failure-rank0.txt").read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_worker_that_is_killed(tmp_path: Path, ranks: int) -> None:
    line = one_line(run_ranks(with_a_killed_worker, ranks, str(tmp_path)))
    assert line.startswith("localpipe: rank 0, ")
    assert "a worker of the train loader died: DataLoader worker (pid" in line
    assert "killed by signal: Killed" in line or "exited unexpectedly" in line  # in its handler, or while it reads
    pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert len(pids) == 2 and not [pid for pid in pids if alive(pid)]
