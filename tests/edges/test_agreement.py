"""Ranks whose configuration or code differs are refused before step 0, with one line that names key and ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers_spawn import RankResult, run_ranks
from tiny import Batches, network, tiny_config

import pipeline.run.beginning
from pipeline import Config, LoaderData, train
from pipeline.base import version
from pipeline.base.version import VERSION, code_version

ODD = 1  # the rank that differs


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with other values in some sections."""
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)


def start(rank: int, folder: str, sections: dict[str, dict[str, Any]], other_code: bool = False) -> dict[str, Any]:
    """Train on three ranks; rank ODD has other values in ``sections``, or other code."""
    if other_code and rank == ODD:
        pipeline.run.beginning.code_version = lambda: f"{VERSION}+0123456789ab"
    config = tiny_config("dgl", "plain", 1, 3, train={"epochs": 1})
    return train(
        changed(config, **sections) if rank == ODD else config,
        network=network(),
        data=LoaderData(Batches(), Batches()),
        run_dir=Path(folder) / "run",
        quiet=True,
    )


def refusal(results: list[RankResult]) -> str:
    """The one line that all ranks together have printed."""
    assert [result.exit_code for result in results] == [1, 1, 1], [result.stderr for result in results]
    lines = [line for result in results for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"optim": {"lr": 0.2}},
            "localpipe: ranks disagree about optim.lr: ranks 0, 2 have 0.05; rank 1 has 0.2",
        ),
        (
            {"partition": {"kind": "given", "stages": (1, 1, 1)}},
            'localpipe: ranks disagree about partition.kind: ranks 0, 2 have "count"; rank 1 has "given", and about '
            "partition.stages: ranks 0, 2 have []; rank 1 has [1, 1, 1]",
        ),
        (
            {"checkpoint": {"keep": 3}},
            "localpipe: ranks disagree about checkpoint.keep: ranks 0, 2 have 2; rank 1 has 3",
        ),
    ],
)
def test_another_value_on_one_rank_is_named(tmp_path: Path, sections: dict[str, dict[str, Any]], line: str) -> None:
    assert refusal(run_ranks(start, 3, str(tmp_path), sections)) == line


def test_of_many_keys_the_first_three_are_named_and_the_others_counted(tmp_path: Path) -> None:
    sections = {"optim": {"lr": 0.2, "weight_decay": 0.0}, "train": {"seed": 1, "epochs": 2, "max_steps": 7}}
    line = refusal(run_ranks(start, 3, str(tmp_path), sections))
    assert "optim.lr" in line and "optim.weight_decay" in line and "train.epochs" in line
    assert "train.seed" not in line and line.endswith(", and about 2 more")


def test_another_code_on_one_rank_is_named(tmp_path: Path) -> None:
    line = refusal(run_ranks(start, 3, str(tmp_path), {}, True))
    assert line == (
        f"localpipe: ranks disagree about the version of the code: ranks 0, 2 have '{code_version()}'; "
        f"rank 1 has '{VERSION}+0123456789ab'"
    )


def test_threads_and_devices_may_differ(tmp_path: Path) -> None:
    results = run_ranks(start, 3, str(tmp_path), {"runtime": {"threads": 2, "device": "auto"}})
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]


def test_the_code_version_sees_every_byte_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "base").mkdir()
    files = {"base/version.py": "a", "data/files.py": "b", "recipes/one.toml": "c"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(version, "__file__", str(tmp_path / "base" / "version.py"))
    code_now = code_version.__wrapped__  # which a process asks once
    seen = {code_now()}
    for name, text in files.items():
        (tmp_path / name).write_text(text + " ")
        seen.add(code_now())
        (tmp_path / name).write_text(text)
        assert code_now() in seen
    (tmp_path / "data" / "files.py").rename(tmp_path / "data" / "other.py")
    seen.add(code_now())
    (tmp_path / "data" / "notes.txt").write_text("no code")
    assert code_now() in seen
    assert len(seen) == 5
    assert all(found.startswith(f"{VERSION}+") and len(found) == len(VERSION) + 13 for found in seen)
