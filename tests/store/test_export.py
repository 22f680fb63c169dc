"""An exported file: the weights of the checkpoint, complete or not there, for networks that know nothing of us."""

from __future__ import annotations

import hashlib
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import Batches, network, tiny_config
from torch import nn
from torchvision import models

from pipeline import ConfigError, LoaderData, build_blocks, export, load_config, load_model, train
from pipeline.base.config import Config
from pipeline.store.checkpoint import FOLDER, open_checkpoint, step_folders

SMALL = (
    "runtime.device=cpu", "runtime.threads=1", "precision.compute=fp32", "optim.warmup_epochs=0",
    "model.cuts=even", "log.curve=false",
)


def config(*assignments: str) -> Config:
    return load_config(assignments=[*SMALL, *assignments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with heads of both levels."""
    folder = tmp_path_factory.mktemp("run") / "resnet20"
    method = ("method.name=dgl", "hierarchy.cascade_span=2", "patches.grid=2")
    train(config("model.name=resnet20", "model.modules=3", *method, "train.max_steps=2"), run_dir=folder, quiet=True)
    return folder


def read(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run launch/export.py in this process; its exit code."""
    script = Path(__file__).parents[2] / "launch" / "export.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    return runpy.run_path(str(script))["main"]()


def test_the_file_holds_the_weights_of_the_uncut_network(run: Path, tmp_path: Path) -> None:
    written = export(run, tmp_path / "mine.pt")
    state = read(tmp_path / "mine.pt")
    assert type(state) is dict and same(state, read(run / "model.pt"))
    model = load_model(config("model.name=resnet20"), classes=10)
    model.load_state_dict(state, strict=True)
    assert written.step == 2 and written.checkpoint == open_checkpoint(run).path
    assert written.parameters == sum(p.numel() for p in model.parameters())
    assert written.sha256 == hashlib.sha256((tmp_path / "mine.pt").read_bytes()).hexdigest()


def test_heads_come_along_when_they_are_asked_for(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "all.pth", heads=True)
    state = read(tmp_path / "all.pth")
    heads = {key.removeprefix("heads."): state.pop(key) for key in list(state) if key.startswith("heads.")}
    assert same(state, read(run / "model.pt")) and same(heads, read(run / "heads.pt"))
    assert {key.rsplit(".terms")[0] for key in heads} == {
        "module0.independent", "module1.independent", "module1.cascade"
    }


def test_the_same_checkpoint_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    (folder,) = step_folders(run / FOLDER)
    first, second = export(run, tmp_path / "first.pt"), export(folder, tmp_path / "second.pt")
    assert first.sha256 == second.sha256


def test_a_torchvision_backbone_loads_into_torchvision(tmp_path: Path) -> None:
    resnet18 = ("model.name=resnet18", "model.modules=2", "model.cuts=even", "method.name=dgl")
    short = ("data.batch_size=32", "train.max_steps=1", "optim.schedule=constant")
    train(config(*resnet18, *short), run_dir=tmp_path / "run", quiet=True)
    written = export(tmp_path / "run", tmp_path / "resnet18.pt")
    theirs = models.resnet18(num_classes=10)
    theirs.load_state_dict(read(tmp_path / "resnet18.pt"), strict=True)
    assert written.parameters == sum(p.numel() for p in theirs.parameters())
    ours = load_model(config("model.name=resnet18"), classes=10)
    ours.load_state_dict(read(tmp_path / "run" / "model.pt"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_a_network_of_ones_own_loads_its_file(tmp_path: Path) -> None:
    settings = tiny_config("infopro", "hpff", 2, 4, schedule={"kind": "async"}, train={"epochs": 1})
    mine = network()
    data = LoaderData(Batches(), Batches())
    train(settings, network=mine, data=data, run_dir=tmp_path / "run", quiet=True)
    export(tmp_path / "run", tmp_path / "mine.pt")
    fresh = network()
    fresh.load_state_dict(read(tmp_path / "mine.pt"), strict=True)
    assert same(dict(fresh.state_dict()), dict(mine.state_dict()))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("there.pt", {}, "there.pt' exists already; choose another name"),
        ("nowhere/mine.pt", {}, "there is no directory"),
        ("mine.onnx", {}, "the suffix of .*mine.onnx' is not known; name the file .pt, .pth or .safetensors"),
        ("mine.pt", {"fmt": "onnx"}, "format 'onnx' is not known"),
    ],
)
def test_what_cannot_be_written_is_refused(
    run: Path, tmp_path: Path, name: str, options: dict[str, Any], words: str
) -> None:
    (tmp_path / "there.pt").write_text("mine")
    with pytest.raises(ConfigError, match=words):
        export(run, tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_the_format_can_be_given(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "weights.bin", fmt="pt")
    assert same(read(tmp_path / "weights.bin"), read(run / "model.pt"))


def test_a_failed_write_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """A file may not grow beyond 100 kB here, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"mine.pt' cannot be written \(File too large\)"):
            export(run, tmp_path / "mine.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_has_left_is_removed_by_the_next(run: Path, tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for name in (f".other.safetensors.{int(gone.stdout)}.tmp", f".mine.pt.{os.getppid()}.tmp"):
        (tmp_path / name).write_text("half of it")
    (tmp_path / f".notes.txt.{int(gone.stdout)}.tmp").write_text("of another program")
    export(run, tmp_path / "mine.pt")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine.pt", f".mine.pt.{os.getppid()}.tmp", f".notes.txt.{int(gone.stdout)}.tmp"}


def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_config("dgl", modules=2, train={"epochs": 1})
    data = LoaderData(Batches(), Batches())
    train(settings, network=network(), data=data, run_dir=tmp_path / "run", quiet=True)
    capsys.readouterr()
    damaged = open_checkpoint(tmp_path / "run").path / "module-001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    for source in (tmp_path / "run", damaged.parent):
        assert command_line(monkeypatch, source, "--output", tmp_path / "mine.pt") == 2
        line = capsys.readouterr().err
        assert line.startswith("localpipe: ") and line.count("\n") == 1
        assert "module-001.safetensors has changed since it was written" in line
    assert not (tmp_path / "mine.pt").exists()


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        export(tmp_path / "nowhere", tmp_path / "mine.pt")
    with pytest.raises(ConfigError, match="manifest"):
        export(tmp_path, tmp_path / "mine.pt")


def test_the_command_line_says_what_it_wrote_on_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(monkeypatch, run, "--output", tmp_path / "mine.pt") == 0
    line = capsys.readouterr().out
    digest = hashlib.sha256((tmp_path / "mine.pt").read_bytes()).hexdigest()
    assert line.count("\n") == 1 and "mine.pt: step 2 of " in line and digest in line
    parameters = sum(p.numel() for block in build_blocks("resnet20", 3, 10).values() for p in block.parameters())
    assert f"{parameters:,} parameters" in line


# --- safetensors ------------------------------------------------------------------------------------------------------


def test_a_safetensors_file_is_read_back(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    export(run, path)
    assert same(load_file(path), read(run / "model.pt"))
    digest = open_checkpoint(run).config.fingerprint()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "2", "config_sha256": digest, "backbone": "resnet20"}
    model: nn.Module = load_model(config("model.name=resnet20"), classes=10)
    model.load_state_dict(load_file(path), strict=True)
