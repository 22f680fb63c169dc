"""It learns: the default job as a user starts it, and CIFAR-10 from a tar file of JPEG images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import load_config, load_model
from pipeline.data import open_data
from pipeline.store.run_directory import read_metrics

ROOT = Path(__file__).parent.parent
DEFAULT_ERROR_PCT = 2.0
CIFAR_STEPS, CIFAR_BATCH = 240, 64
CIFAR_ERROR_PCT = 70.0  # after 15,360 images, less than a third of an epoch; guessing gives 90


def launch(tmp_path: Path, *arguments: str, ranks: int = 4) -> tuple[dict[str, Any], str]:
    """Run launch/train.py under torchrun from another directory; returns summary.json and the output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(ROOT / "launch" / "train.py"), "--run-dir", str(tmp_path / "run"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads((tmp_path / "run" / "summary.json").read_text()), result.stdout


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.real
def test_the_default_job_learns_and_leaves_a_complete_run_directory(tmp_path: Path) -> None:
    summary, output = launch(tmp_path)

    assert summary["test_error_pct"] <= DEFAULT_ERROR_PCT
    assert (summary["world_size"], summary["modules"], summary["method"]) == (4, 4, "infopro")
    assert summary["schedule"] == "exact" and summary["epochs"] * 45 == summary["steps"]
    assert len(summary["weights_sha256"]) == 64 and summary["images_per_s"] > 0
    for rank, entry in enumerate(summary["ranks"]):
        assert entry["modules"] == [rank] and entry["device"]
        assert 0 < entry["busy_fraction"] <= 1 and 0 <= entry["wait_fraction"] < 1
        assert entry["peak_memory_bytes"] > 0
        assert (entry["bytes_sent"] > 0) == (rank < 3)  # the last stage of the paper's HPFF sends nothing
    epochs = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(epochs) == summary["epochs"]
    assert [sorted(module["losses"]) for module in epochs[-1]["modules"]] == [
        ["independent.reconstruction", "independent.task"],
        ["cascade.reconstruction", "cascade.task", "independent.reconstruction", "independent.task"],
        ["cascade.reconstruction", "cascade.task", "independent.reconstruction", "independent.task"],
        ["final"],
    ]
    assert f"{summary['test_error_pct']:.2f} %" in output
    assert_uncut_model_agrees(tmp_path / "run", summary)


def assert_uncut_model_agrees(run: Path, summary: dict[str, Any]) -> None:
    """model.pt loads into the un-cut network, which makes exactly the reported number of errors."""
    config = load_config(file=run / "config.toml")
    data = open_data("digits")
    model = load_model(config, classes=len(data.classes))
    model.load_state_dict(torch.load(run / "model.pt", weights_only=True))
    model.eval()
    indices = torch.arange(len(data.test))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    with torch.no_grad():
        logits = model((data.test.images(indices) / 255.0 - mean) / std)
    wrong = int((logits.argmax(dim=1) != data.test.labels).sum())
    assert 100.0 * wrong / len(indices) == pytest.approx(summary["test_error_pct"])


@pytest.mark.slow
@pytest.mark.real
def test_cifar10_trains_from_a_tar_of_jpeg_images(tmp_path: Path) -> None:
    archive = Path(os.environ.get("LOCALPIPE_SHARED", "")) / "data" / "cifar10-jpeg.tar.xz"
    if not os.environ.get("LOCALPIPE_SHARED") or not archive.is_file():
        pytest.skip("set LOCALPIPE_SHARED to a directory with data/cifar10-jpeg.tar.xz to run this test")
    summary, _ = launch(
        tmp_path,
        "--recipe",
        "cifar10-folder-resnet20-k4-dgl-hpff",
        *("--set", f"data.root={archive}"),
        *("--set", f"data.batch_size={CIFAR_BATCH}"),
        *("--set", f"train.max_steps={CIFAR_STEPS}"),
        *("--set", "optim.schedule=constant", "--set", "optim.warmup_epochs=0", "--set", "optim.lr=0.03"),
        ranks=2,
    )
    assert summary["steps"] == CIFAR_STEPS
    assert summary["test_error_pct"] < CIFAR_ERROR_PCT
