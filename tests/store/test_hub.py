"""A directory that can be shared: what the network is, its weights, a card, and the network back from it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Batches, network, tiny_config
from torch import nn
from torchvision import models

from pipeline import ConfigError, LoaderData, __version__, export, load_config, load_exported, load_model, train
from pipeline.base.config import Config
from pipeline.data.catalogue import CATALOGUE, FOLDER, normalisation
from pipeline.store.checkpoint import open_checkpoint

SMALL = (
    "runtime.device=cpu", "runtime.threads=1", "precision.compute=fp32", "optim.warmup_epochs=0",
    "model.cuts=even", "log.curve=false",
)


def config(*assignments: str) -> Config:
    return load_config(assignments=[*SMALL, *assignments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on images of digits, with heads of both levels, tested at its end."""
    folder = tmp_path_factory.mktemp("run") / "resnet20"
    method = ("method.name=dgl", "hierarchy.cascade_span=2", "patches.grid=2")
    train(config("model.name=resnet20", "model.modules=3", *method, "train.max_steps=2"), run_dir=folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def shared(run: Path) -> Path:
    """Its directory to share."""
    return export(run, run / "shared", fmt="hub").path


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def test_it_says_what_the_network_is(run: Path, shared: Path) -> None:
    assert sorted(path.name for path in shared.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    saved, summary = open_checkpoint(run), json.loads((run / "summary.json").read_text())
    described = json.loads((shared / "config.json").read_text())
    digits = CATALOGUE["digits"]
    expected = {
        **{"format": "localpipe-model-1", "localpipe": __version__, "model": "resnet20", "custom_network": False},
        **{"task": "Classification", "classes": 10, "image_shape": [3, 32, 32], "heads": False, "ema": False},
        **{"normalisation": {"mean": list(digits.mean), "std": list(digits.std)}, "modules": saved.module_names},
        **{"method": "dgl", "cascade_span": 2, "patches_grid": 2, "data": "digits", "step": 2, "epoch": 1},
        "metrics": {"test_error_pct": summary["test_error_pct"], "test_loss": summary["test_loss"]},
        "config_sha256": saved.config.fingerprint(),
    }
    assert described == expected and summary["test_error_pct"] is not None


def test_the_network_comes_back_with_the_same_logits(run: Path, shared: Path) -> None:
    expected = load_model(config("model.name=resnet20"), classes=10)
    expected.load_state_dict(torch.load(run / "model.pt", weights_only=True))
    found = load_exported(shared)
    assert not found.training and torch.equal(logits(found), logits(expected))


def test_heads_may_come_along_and_are_not_in_the_way(run: Path, shared: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "all", heads=True, fmt="hub")
    names = load_file(tmp_path / "all" / "model.safetensors").keys()
    assert any(name.startswith("heads.module1.cascade.") for name in names)
    assert json.loads((tmp_path / "all" / "config.json").read_text())["heads"] is True
    assert torch.equal(logits(load_exported(tmp_path / "all")), logits(load_exported(shared)))
    assert "under `heads.module`" in (tmp_path / "all" / "README.md").read_text()


def test_the_weights_of_a_torchvision_backbone_load_into_torchvision_and_back(tmp_path: Path) -> None:
    resnet18 = ("model.name=resnet18", "model.modules=2", "model.cuts=even", "method.name=dgl")
    short = ("data.batch_size=32", "train.max_steps=1", "optim.schedule=constant")
    train(config(*resnet18, *short), run_dir=tmp_path / "run", quiet=True)
    export(tmp_path / "run", tmp_path / "shared", fmt="hub")
    theirs = models.resnet18(num_classes=10)
    theirs.load_state_dict(load_file(tmp_path / "shared" / "model.safetensors"), strict=True)
    assert torch.equal(logits(theirs), logits(load_exported(tmp_path / "shared")))
    mine = load_exported(tmp_path / "shared", network=models.resnet18(num_classes=10))
    assert torch.equal(logits(theirs), logits(mine))


class WithHeads(nn.Module):
    """A network with a name that exports give to auxiliary heads, too, as torchvision's vision transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network(3)[:-1]
        self.heads = network(3)[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.heads(self.body(x))
        return found


@pytest.mark.parametrize("heads", [False, True])
def test_a_network_of_ones_own_gets_its_weights_back(tmp_path: Path, heads: bool) -> None:
    settings = tiny_config("dgl", "plain", 1, 2, train={"epochs": 1})
    mine = WithHeads()
    train(settings, network=mine, data=LoaderData(Batches(), Batches()), run_dir=tmp_path / "run", quiet=True)
    export(tmp_path / "run", tmp_path / "shared", fmt="hub", heads=heads)
    described = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert described["custom_network"] and described["normalisation"] is None and described["data"] == "loader"
    with pytest.raises(ConfigError, match="of a network of your own, which no name can rebuild; pass network="):
        load_exported(tmp_path / "shared")
    assert torch.equal(logits(load_exported(tmp_path / "shared", network=WithHeads())), logits(mine))
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "network=yours" in card and "which is not recorded here" in card


def test_the_card_says_what_is_known_and_nothing_else(shared: Path, run: Path) -> None:
    text = (shared / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert text.startswith("---\nlibrary_name: localpipe\n")
    assert f"test_error_pct: {summary['test_error_pct']:.6g}" in text and "3 local modules" in text
    assert 'pipeline.load_exported("DIRECTORY")' in text and "## Not known" in text


def test_a_step_without_a_test_claims_nothing(tmp_path: Path) -> None:
    settings = tiny_config("dgl", "plain", 1, 1, train={"epochs": 1}, checkpoint={"every_steps": 3, "keep": 9})
    train(settings, network=network(), data=LoaderData(Batches(), Batches()), run_dir=tmp_path / "run", quiet=True)
    export(tmp_path / "run" / "checkpoints" / "step-00000003", tmp_path / "shared", fmt="hub")
    described = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert described["metrics"] == {} and described["method"] == "bp" and described["step"] == 3
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "At this step nothing was measured." in card and "It was trained by backpropagation" in card


def test_what_normalises_the_images_is_known_of_every_data_set_that_can_be_named() -> None:
    for name, entry in CATALOGUE.items():
        assert normalisation(name, entry.image_shape) == (entry.mean, entry.std)
    assert normalisation(FOLDER, (3, 32, 32)) == (CATALOGUE["cifar10"].mean, CATALOGUE["cifar10"].std)
    assert normalisation(FOLDER, (3, 64, 64)) != normalisation(FOLDER, (3, 32, 32))
    assert normalisation("loader", (3, 32, 32)) is None


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_a_directory_that_is_there_is_not_touched(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine' exists already"):
        export(run, tmp_path / "mine", fmt="hub")
    assert list((tmp_path / "mine").iterdir()) == []


def test_what_a_killed_export_has_left_is_removed_by_the_next(run: Path, tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for pid in (int(gone.stdout), os.getpid(), os.getppid()):
        (tmp_path / f".mine.{pid}.tmp").mkdir()
        (tmp_path / f".mine.{pid}.tmp" / "config.json").write_text("half of it")
    export(run, tmp_path / "mine", fmt="hub")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", f".mine.{os.getppid()}.tmp"}


def test_a_write_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match=r"mine' cannot be written \(No space left on device\)"):
        export(run, tmp_path / "mine", fmt="hub")
    assert list(tmp_path.iterdir()) == []


# --- directories of others --------------------------------------------------------------------------------------------


def test_a_directory_without_a_description_is_refused(tmp_path: Path, shared: Path) -> None:
    with pytest.raises(ConfigError, match="config.json' cannot be read"):
        load_exported(tmp_path)
    (tmp_path / "config.json").write_bytes((shared / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="model.safetensors' cannot be read"):
        load_exported(tmp_path)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"format": "localpipe-model-2"}, 'is not of localpipe\'s export; its format must be "localpipe-model-1"'),
        ({"model": None}, "model = null, which must be str"),
        ({"model": "resnet21"}, "'resnet21' is no known backbone; did you mean"),
        ({"classes": "10"}, 'classes = "10", which must be int'),
        ({"classes": True}, "classes = true, which must be int"),
        ({"classes": 0}, "must be whole numbers from 1 on"),
        ({"classes": 9}, "does not fit the network"),
        ({"image_shape": []}, "must be whole numbers from 1 on"),
        ({"image_shape": [3.5, 32, 32]}, "must be whole numbers from 1 on"),
        ({"custom_network": "no"}, "custom_network ="),
    ],
)
def test_a_description_that_cannot_be_right_is_one_line(
    tmp_path: Path, shared: Path, entries: dict[str, Any], words: str
) -> None:
    described = json.loads((shared / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, **entries}))
    (tmp_path / "model.safetensors").write_bytes((shared / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError) as caught:
        load_exported(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", struct.pack("<Q", 2**60) + b"{}", b"\x80\x04cos\nsystem\n"])
def test_weights_that_lie_about_themselves_are_one_line(tmp_path: Path, shared: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes((shared / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="model.safetensors' cannot be read .*header"):
        load_exported(tmp_path)
