"""A decoder on a text file, by the names of both: tested in perplexity, exported, gone on with, planned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_text import HPFF, LENGTH, PLAIN, TESTED, TEXT, configured

from pipeline import ConfigError, evaluate, explain, export, load_config, load_exported, read_metrics, train


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_bytes(TEXT)
    return path


def test_a_run_is_evaluated_exported_and_gone_on_with(file: Path, tmp_path: Path) -> None:
    saved = configured(file, *HPFF, "checkpoint.every_epochs=1")
    summary = train(saved, run_dir=tmp_path / "run", quiet=True)
    perplexity = summary["test_metrics"]["perplexity"]
    assert 20 < perplexity < 256 and summary["metric"]["name"] == "perplexity"

    evaluation = evaluate(tmp_path / "run")  # the names are in the checkpoint
    assert evaluation.task == "NextToken" and evaluation.images == (TESTED - 1) // LENGTH
    rows = {(row.module, row.exit): row.metrics["perplexity"] for row in evaluation.rows}
    assert rows[3, "final"] == perplexity
    both = {(module, level) for module in (1, 2) for level in ("independent", "cascade")}
    assert rows.keys() == {(0, "independent"), *both, (3, "final")}
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {name for module in line["modules"] for name in module["head_metrics"]} == {
        f"{level}.perplexity" for level in ("independent", "cascade", "final")
    }

    export(tmp_path / "run", tmp_path / "hub", fmt="hub")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["task"] == "NextToken"
    ids = torch.tensor(list(TEXT[-TESTED:]))
    windows = ids[: (TESTED - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    with torch.no_grad():
        logits = load_exported(tmp_path / "hub")(windows[:, :-1])
    entropy = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert perplexity == pytest.approx(math.exp(float(entropy)), rel=1e-5)

    more = configured(file, *HPFF, "checkpoint.every_epochs=1", "train.max_steps=5")
    resumed = train(more, run_dir=tmp_path / "run", quiet=True)
    straight = train(more, run_dir=tmp_path / "straight", quiet=True)
    assert resumed["weights_sha256"] == straight["weights_sha256"] and resumed["steps"] == 5


def test_it_is_planned_without_the_file() -> None:
    settings = [*PLAIN, "data.root=/nowhere", *HPFF, "partition.steps=1", "partition.warmup=0"]
    report = explain(load_config(assignments=settings), 2, count=False, forms=False)
    assert report.step_s > 0 and [row.levels for row in report.modules][-1] == ("final",)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (("model.name=resnet20",), r"block 'stem' fails on an input of shape \(16,\)"),
        (("model.name=vit_b_16",), r"block 'conv_proj' fails on an input of shape \(16,\)"),
        (("data.name=digits",), "takes sequences of ids, not images of 32 x 32; use data.name=text"),
        (("method.name=predsim",), "'predsim' compares the classes of whole rows, but the target of NextToken is"),
        (("method.head=1c2f", "method.name=infopro"), "a network that classifies whole rows, NextToken brings its own"),
        (("data.root=",), "data.name = 'text' needs a file of text; set data.root=FILE"),
    ],
)
def test_what_does_not_go_with_text_is_refused_in_one_line(
    assignments: tuple[str, ...], words: str, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        train(configured(file, "method.name=greedy", *assignments), run_dir=tmp_path, quiet=True)
    assert "\n" not in str(refusal.value)
