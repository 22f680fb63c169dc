"""A run that goes on from a checkpoint ends with the weights of the run that was never disturbed: bit for bit, on other
numbers of ranks, from the middle of an epoch, in every deterministic schedule. Its network begins with other weights,
so that one that began anew would be found out."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from tiny import Batches, network, tiny_blocks, tiny_config
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pipeline import LoaderData, read_metrics, train
from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.base.recipes import load_config
from pipeline.base.validation import from_dict, validate, with_values
from pipeline.store.checkpoint import FOLDER, open_checkpoint, step_folders
from pipeline.store.resume import choose_start

CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "exact": ("infopro", "hpff", 2, {}),
    "parts": ("predsim", "hpff", 2, {"micro_batches": 2}),
    "async": ("infopro", "hpff", 2, {"kind": "async"}),
    "async-2": ("dgl", "hpff", 2, {"kind": "async", "delay": 2, "micro_batches": 2}),
    "async-3-hops": ("dgl", "released", 3, {"kind": "async"}),
    "man": ("greedy", "plain", 2, {}),
}
MAN = {"method.front": "man++", "method.average": 0.5, "method.average_every": 3, "method.average_lag": 4}
"""Weights are on their way upstream where a run is saved."""
SAVED = [4, 5, 8, 10]  # every four steps, and at the end of both epochs of five


def run(
    case: str, folder: Path, resume: str = "auto", seed: int = 7, stages: tuple[int, ...] = (), **checkpoint: Any
) -> dict[str, Any]:
    method, variant, span, schedule = CASES[case]
    sections: dict[str, dict[str, Any]] = {"schedule": schedule, "train": {"epochs": 2}, "checkpoint": checkpoint}
    if stages:
        sections["partition"] = {"kind": "given", "stages": list(stages)}
    return train(
        with_values(tiny_config(method, variant, span, 4, **sections), MAN if case == "man" else {}),
        network=network(seed),
        data=LoaderData(Batches(), [next(iter(Batches()))]),
        run_dir=folder,
        resume=resume,
        quiet=True,
    )


def save_all(rank: int, folder: str) -> dict[str, tuple[str, str]]:
    """Digests of each case without and with saving."""
    found = {}
    for case in CASES:
        alone = run(case, Path(folder) / f"{case}-undisturbed", every_epochs=0)
        saving = run(case, Path(folder) / case, every_steps=4, keep=99)
        found[case] = (alone["weights_sha256"], saving["weights_sha256"])
    return found


def resume_all(
    rank: int, folder: str, ranks: int, steps: list[int], stages: tuple[int, ...]
) -> dict[tuple[str, int], tuple[str, float]]:
    """From checkpoints of every case to the end: digest of the weights, mean loss of the last epoch."""
    found = {}
    for case in CASES:
        assert sorted(int(path.name[5:]) for path in step_folders(Path(folder) / case / FOLDER)) == SAVED
        for step in steps:
            path = Path(folder) / case / FOLDER / f"step-{step:08d}"
            there = Path(folder) / f"{case}-from-{step}-on-{ranks}"
            summary = run(case, there, str(path), seed=8, stages=stages, every_epochs=0)
            found[case, step] = (summary["weights_sha256"], summary["train_loss"])
    return found


@pytest.mark.slow
@pytest.mark.alone
def test_resuming_on_other_numbers_of_ranks_or_at_another_cut_gives_the_same_weights(tmp_path: Path) -> None:
    results = run_ranks(save_all, 2, str(tmp_path), timeout_s=240)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    expected = results[0].value
    assert all(alone == saving for alone, saving in expected.values())  # saving disturbs nothing
    assert len({alone for alone, _ in expected.values()}) == len(CASES)
    with ThreadPoolExecutor() as pool:
        jobs = {
            (ranks, tuple(steps)): pool.submit(
                run_ranks, resume_all, ranks, str(tmp_path), ranks, steps, stages, timeout_s=240
            )
            for ranks, steps, stages in ((1, SAVED, ()), (4, SAVED, ()), (2, SAVED[:1], (1, 3)))
        }
    for (ranks, steps), job in jobs.items():
        results = job.result()
        assert [result.exit_code for result in results] == [0] * ranks, [result.stderr for result in results]
        found = results[0].value
        assert sorted(found) == sorted((case, step) for case in CASES for step in steps)
        for (case, step), (digest, loss) in found.items():
            assert digest == expected[case][0], (case, step, ranks)
            metrics = (tmp_path / f"{case}-undisturbed" / "metrics.jsonl").read_text().splitlines()
            assert loss == json.loads(metrics[-1])["train_loss"]
            lines = (tmp_path / f"{case}-from-{step}-on-{ranks}" / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_a_finished_run_goes_on_when_it_may_train_longer(tmp_path: Path) -> None:
    short = tiny_config("dgl", "hpff", 2, 4, train={"epochs": 1})
    longer = tiny_config("dgl", "hpff", 2, 4, train={"epochs": 2})
    data = LoaderData(Batches(), Batches())
    first = train(short, network=network(), data=data, run_dir=tmp_path / "run", quiet=True)
    again = train(short, network=network(8), data=data, run_dir=tmp_path / "run", quiet=True)
    assert again["weights_sha256"] == first["weights_sha256"] and again["steps"] == 5
    more = train(longer, network=network(8), data=data, run_dir=tmp_path / "run", quiet=True)
    assert more["steps"] == 10
    straight = train(longer, network=network(), data=data, run_dir=tmp_path / "straight", quiet=True)
    assert more["weights_sha256"] == straight["weights_sha256"]  # the learning rate is constant here
    assert open_checkpoint(tmp_path / "run").step == 10


def test_a_run_that_max_steps_has_ended_goes_on_within_its_epoch(tmp_path: Path) -> None:
    """Its late work was done at its end, so none is open; the epoch's line in metrics.jsonl is replaced."""
    late = {"kind": "async", "delay": 2}
    data = LoaderData(Batches(), Batches())
    for steps in (7, 8, 10):  # an epoch has five; the second resume comes within the lag of the first
        config = tiny_config("dgl", "hpff", 2, 4, schedule=late, train={"epochs": 2, "max_steps": steps})
        summary = train(config, network=network(), data=data, run_dir=tmp_path, quiet=True)
        assert summary["steps"] == steps
        assert [line["epoch"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    shorter = tiny_config("dgl", "hpff", 2, 4, schedule=late, train={"epochs": 2, "max_steps": 6})
    with pytest.raises(ConfigError):
        train(shorter, network=network(), data=data, run_dir=tmp_path, quiet=True)


def test_a_stop_in_the_last_step_leaves_no_late_work(tmp_path: Path) -> None:
    """From a checkpoint within an epoch, with late work open, to a run that ends right there."""
    late = {"kind": "async", "delay": 2}
    data = LoaderData(Batches(), Batches())

    def config(**more: Any) -> Config:
        return tiny_config("dgl", "hpff", 2, 4, schedule=late, **more)

    train(
        config(train={"epochs": 1}, checkpoint={"every_steps": 3, "keep": 9}),
        network=network(), data=data, run_dir=tmp_path / "long", quiet=True,
    )  # fmt: skip
    three = config(train={"epochs": 1, "max_steps": 3})
    straight = train(three, network=network(), data=data, run_dir=tmp_path / "straight", quiet=True)
    resumed = train(
        three, network=network(8), data=data, run_dir=tmp_path / "resumed", quiet=True,
        resume=str(tmp_path / "long" / FOLDER / "step-00000003"),
    )  # fmt: skip
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert open_checkpoint(tmp_path / "resumed").step == 3  # it has one of its own


class Dropped(Dataset):
    """Images with random noise of the moment."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(3, 8, 8), index % 4


@pytest.mark.parametrize(("workers", "own"), [(0, False), (1, False), (0, True)])
def test_random_transforms_of_a_loader_are_those_of_the_undisturbed_run(
    tmp_path: Path, workers: int, own: bool
) -> None:
    """A module with Dropout draws from the same random numbers, in the same process."""

    def run(folder: str, resume: str, **more: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3) if own else None
        loader = DataLoader(Dropped(), batch_size=8, shuffle=True, num_workers=workers, generator=generator)
        blocks = tiny_blocks()
        blocks["a"] = nn.Sequential(blocks["a"], nn.Dropout(0.3))
        torch.manual_seed(7)
        config = tiny_config("dgl", "hpff", 2, 4, train={"epochs": 2}, checkpoint={"every_steps": 4, "keep": 9})
        data = LoaderData(loader, loader)
        return train(config, network=nn.Sequential(blocks), data=data, run_dir=tmp_path / folder, resume=resume,
                     quiet=True)

    torch.manual_seed(7)
    first = run("first", "auto")
    torch.manual_seed(99)
    again = run("again", str(tmp_path / "first" / FOLDER / "step-00000008"))  # in the second epoch of five steps
    assert again["weights_sha256"] == first["weights_sha256"]


def changed(config: Config, section: str, **entries: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **entries)})


def test_a_changed_configuration_is_printed_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config("dgl", "hpff", 2, 4, train={"epochs": 1})
    summary = train(config, network=network(), data=LoaderData(Batches(), Batches()), run_dir=tmp_path, quiet=True)
    used = open_checkpoint(tmp_path).config
    assert summary["steps"] == 5

    start = choose_start("auto", tmp_path, False, used)
    assert start.checkpoint is not None and start.lines == ()
    start = choose_start("auto", tmp_path, False, changed(changed(used, "optim", lr=0.5), "runtime", deadline_s=9.0))
    assert "changed since the checkpoint: optim.lr = 0.05 -> 0.5" in start.lines
    train(changed(used, "optim", lr=0.5), network=network(), data=LoaderData(Batches(), Batches()), run_dir=tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "resumed from" in printed and "changed since the checkpoint: optim.lr = 0.05 -> 0.5" in printed
    for section, entries, words in (
        ("model", {"modules": 3}, r"model\.modules \(4 there, 3 now\)"),
        ("data", {"batch_size": 4}, r"data\.batch_size"),
        ("method", {"head": "cnn"}, r"method\.head"),
        ("train", {"seed": 1}, r"train\.seed"),
    ):
        with pytest.raises(ConfigError, match=words + ".*--resume none"):
            choose_start("auto", tmp_path, False, changed(used, section, **entries))


def test_where_a_run_starts(tmp_path: Path) -> None:
    config = load_config()
    assert choose_start("auto", tmp_path, False, config).checkpoint is None
    assert choose_start("none", tmp_path, False, config).checkpoint is None
    with pytest.raises(ConfigError, match="does not exist"):
        choose_start(str(tmp_path / "nowhere"), tmp_path, False, config)
    for name in (".model.pt", ".summary.json", ".writable"):  # of a process that was killed; no other has this number
        (tmp_path / f"{name}.99999999.tmp").touch()
    choose_start("auto", tmp_path, False, config)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "summary.json").touch()
    with pytest.raises(ConfigError, match="without checkpoints"):
        choose_start("auto", tmp_path, False, config)
    assert choose_start("auto", tmp_path, True, config).checkpoint is None  # a restart begins anew
    (tmp_path / FOLDER / "step-00000003").mkdir(parents=True)
    for resume in ("none", str(tmp_path)):
        with pytest.raises(ConfigError, match="already holds checkpoints.*--resume auto"):
            choose_start(resume, tmp_path, False, config)
    (tmp_path / "summary.json").unlink()
    start = choose_start("auto", tmp_path, False, config)
    assert start.checkpoint is None and "no checkpoint of this run is valid: it begins anew" in start.warnings
    assert "has no manifest.json" in start.warnings[-1] and not step_folders(tmp_path / FOLDER)
    assert (tmp_path / FOLDER / "step-00000003.invalid").is_dir()
    assert validate(from_dict({})).checkpoint.keep == 2
