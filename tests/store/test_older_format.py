"""Checkpoints of format 1 still load, with a warning: a pickle describes their tensors, and nothing else is let in."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_module_file import STATE, same
from tiny import Batches, network, tiny_config
from torch import Tensor

from pipeline import LoaderData, export, train
from pipeline.base.config import Config
from pipeline.base.errors import CheckpointError
from pipeline.store.checkpoint import FOLDER, open_checkpoint, step_folders
from pipeline.store.manifest import MANIFEST, module_file, module_folder, sealed
from pipeline.store.older_format import read_older_state

ARCHIVE = Path(__file__).parent / "format-1.tar.xz"
"""A checkpoint that localpipe 0.1.0 wrote, in `async` with AdamW, and the digests of what it read there."""
WARNING = "has format 1 (localpipe 0.1.0), which is still read; new ones have format 2"


def config() -> Config:
    return tiny_config(
        *("dgl", "plain", 2, 2),
        schedule={"kind": "async"},
        train={"epochs": 1},
        optim={"name": "adamw", "lr": 0.01},
        checkpoint={"every_steps": 3, "keep": 9},
    )


def run(folder: Path, resume: str = "auto", seed: int = 8) -> str:
    data = LoaderData(Batches(), [next(iter(Batches()))])
    return str(
        train(config(), network=network(seed), data=data, run_dir=folder, resume=resume, quiet=True)["weights_sha256"]
    )


def write_older(folder: Path, state: dict[str, Tensor]) -> None:
    """As format 1 was written."""
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), no_dist=True)


def digest(state: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, value in state.items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The checkpoint of the archive."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old" / "step-00000003"


def test_weights_optimiser_and_late_work_are_those_that_were_written(old: Path) -> None:
    saved = open_checkpoint(old)
    states = [saved.module_state(index) for index in range(2)]
    assert [digest(state) for state in states] == json.loads((old.parent / "state-sha256.json").read_text())
    assert {"late.2.batch.0.x", "optimiser.0.exp_avg_sq", "losses.steps"} <= states[0].keys()


def test_every_dtype_and_layout_is_read(tmp_path: Path) -> None:
    state = {name: value for name, value in STATE.items() if name != "expanded"}
    write_older(tmp_path / "module-000", state)
    found = read_older_state(tmp_path / "module-000")
    assert same(found, state) and list(found) == list(state)


def test_a_run_goes_on_from_it_with_one_warning(old: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", resume=str(old))
    warnings = [line for line in capfd.readouterr().err.splitlines() if "arning" in line]
    assert warnings == [f"localpipe warning: checkpoint '{old}' {WARNING}"]
    newest = open_checkpoint(tmp_path / "run")
    assert newest.step == 5 and newest.older is None
    export(newest.path, tmp_path / "new.pt")
    assert capfd.readouterr().err == ""
    export(old, tmp_path / "old.pt")
    assert capfd.readouterr().err == f"localpipe warning: checkpoint '{old}' {WARNING}\n"


def test_both_formats_of_one_state_go_on_to_the_same_weights(tmp_path: Path) -> None:
    undisturbed = run(tmp_path / "run", seed=7)
    for path in step_folders(tmp_path / "run" / FOLDER):
        saved = open_checkpoint(path)
        if saved.step == 3:
            break
    older = tmp_path / saved.path.name
    shutil.copytree(saved.path, older)
    files = {name: entry for name, entry in saved.manifest["files"].items() if not name.startswith("module-")}
    for index in range(2):
        (older / module_file(index)).unlink()
        write_older(older / module_folder(index), saved.module_state(index))
        for file in (older / module_folder(index)).iterdir():
            content = file.read_bytes()
            entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            files[f"{module_folder(index)}/{file.name}"] = entry
    manifest = {name: value for name, value in saved.manifest.items() if name != "sha256"}
    (older / MANIFEST).write_text(sealed({**manifest, "format": 1, "files": files}))
    assert run(tmp_path / "from-new", resume=str(saved.path)) == undisturbed
    assert run(tmp_path / "from-old", resume=str(older)) == undisturbed


class Malicious:
    """What a pickle of it does when it is read: call what it names."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("where", ["alone", "among tensors"])
def test_a_pickle_that_names_anything_else_is_refused_and_not_executed(tmp_path: Path, where: str) -> None:
    folder, target = tmp_path / "module-000", tmp_path / "executed"
    write_older(folder, {"weight": torch.ones(2)})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if where == "alone":
        metadata = Malicious(target)
    else:
        metadata.planner_data = {"weight": Malicious(target)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"module-000 is no state of a module .*it names posix.mkdir") as caught:
        read_older_state(folder)
    assert "\n" not in str(caught.value) and not target.exists()


@pytest.mark.parametrize("content", [b"", b"none", b"\x80\x04."])
def test_a_description_that_is_no_pickle_is_one_line(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "module-000"
    write_older(folder, {"weight": torch.ones(2)})
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="module-000 is no state of a module"):
        read_older_state(folder)
