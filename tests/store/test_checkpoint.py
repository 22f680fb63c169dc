"""Checkpoint files: complete or not there, and every change to one of them is noticed by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from pipeline.base.errors import CheckpointError
from pipeline.base.recipes import load_config
from pipeline.base.toml import to_toml
from pipeline.local.task import Metric
from pipeline.store.checkpoint import (
    newest_valid,
    open_checkpoint,
    partial_folder,
    publish,
    remove_old,
    remove_partial,
    set_aside,
    step_folder,
    step_folders,
    write_module,
)
from pipeline.store.manifest import FORMAT, MANIFEST, sealed

STATES = [
    {"blocks.stem.weight": torch.randn(4, 3, 2, 2), "blocks.stem.count": torch.tensor(7)},
    {"blocks.layer1.0.weight": torch.randn(5).double(), "heads.cascade.half": torch.randn(3).bfloat16()},
]
DOCUMENT = {
    **{"localpipe": "0.1.0", "versions": {"torch": "2.9"}, "date": "2026-01-02 03:04:05", "config_sha256": "abc"},
    **{"epoch": 1, "finished_epochs": 0, "images": 96, "wall_s": 1.5, "total_steps": 400, "train_batches": 200},
    **{"modules": [["stem"], ["layer1.0"]], "classes": 10, "image_shape": [3, 8, 8], "custom_network": False},
}


def saved(checkpoints: Path, step: int, error: float | None = None, **entries: Any) -> Path:
    files = {}
    for index, state in enumerate(STATES):
        files |= write_module(partial_folder(checkpoints, step), index, state)
    document = {**DOCUMENT, "late_since": step, "test_error_pct": error, **entries}
    return publish(checkpoints, step, files, document, to_toml(load_config()), [{"epoch": 1}])


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = saved(tmp_path, 12)
    assert path == step_folder(tmp_path, 12) and path.name == "step-00000012"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.step, checkpoint.epoch, checkpoint.image_shape) == (12, 1, (3, 8, 8))
    assert checkpoint.config == load_config()
    assert checkpoint.history() == [{"epoch": 1}]
    for index, state in enumerate(STATES):
        found = checkpoint.module_state(index)
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("module-001.safetensors", flip, "has changed since it was written"),
        ("module-000.safetensors", cut_short, "cut short"),
        ("module-001.safetensors", Path.unlink, "cannot be read"),
        ("config.toml", flip, "has changed"),
        ("history.json", cut_short, "cut short"),
        (MANIFEST, Path.unlink, "has no manifest.json"),
        (MANIFEST, cut_short, "cannot be read"),
    ],
)
def test_damage_is_refused_by_the_name_of_the_file(
    tmp_path: Path, name: str, damage: Callable[[Path], None], words: str
) -> None:
    path = saved(tmp_path, 3)
    damage(path / name)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_number_in_the_manifest_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path, 3)
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"step": 3', '"step": 7'))
    with pytest.raises(CheckpointError, match="manifest.json has changed"):
        open_checkpoint(path)


def forge(path: Path, **entries: Any) -> None:
    """Change the manifest and sign it, as a program with a mistake would."""
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(sealed({**manifest, **entries}))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"step": "x"}, 'step = "x", which must be a whole number from 1 on'),
        ({"step": -5}, "step = -5, which must be a whole number from 1 on"),
        ({"step": True}, "step = true, which must be"),
        ({"step": 7}, "step = 7, its directory is of step 3"),
        ({"total_steps": 2}, "step = 3 is after the last one, total_steps = 2"),
        ({"epoch": 2}, "step = 3 is not in epoch = 2 of train_batches = 200 steps each"),
        ({"train_batches": 2}, "step = 3 is not in epoch = 1 of train_batches = 2 steps each"),
        ({"train_batches": 0}, "train_batches = 0, which must be a whole number from 1 on"),
        ({"finished_epochs": 1}, "finished_epochs = 1 does not go with step = 3 of epoch = 1"),
        ({"late_since": 4}, "late_since = 4 is after step = 3"),
        ({"images": 1.5}, "images = 1.5, which must be a whole number from 0 on"),
        ({"wall_s": float("nan")}, "wall_s = NaN, which must be a number of seconds from 0 on"),
        ({"wall_s": "long"}, "wall_s ="),
        ({"modules": [["stem"], []]}, "modules ="),
        ({"modules": [["stem"], ["stem"]]}, "modules ="),
        ({"modules": [["stem"], ["a"], ["b"]]}, "files has none of module-002.safetensors"),
        ({"classes": None}, "classes = null, which must be a whole number from 1 on"),
        ({"image_shape": [3, 0, 8]}, "image_shape ="),
        ({"custom_network": "no"}, "custom_network ="),
        ({"test_error_pct": 101}, "test_error_pct = 101, which must be null or a number from 0 to 100"),
        ({"localpipe": 1}, "localpipe = 1, which must be a text"),
        ({"versions": []}, "versions ="),
        ({"date": None}, "date ="),
        ({"config_sha256": 7}, "config_sha256 ="),
        ({"levels_together": [1]}, "levels_together = [1], which must be a number of ranks and a list of"),
        ({"levels_together": {"ranks": 2, "modules": [-1]}}, "levels_together ="),
        ({"files": {}}, "files = {}, which must be a table of at least one file"),
        ({"files": {"../config.toml": {"sha256": "0" * 64, "bytes": 1}}}, "files ="),
        ({"files": {"config.toml": {"sha256": "short", "bytes": 1}}}, "files ="),
        ({"files": {"config.toml": {"sha256": "0" * 64, "bytes": -1}}}, "files ="),
        ({"files": {"config.toml": {"sha256": "0" * 64, "bytes": 1}}}, "files has none of history.json"),
    ],
)
def test_a_signed_manifest_that_cannot_be_right_is_refused_by_its_entry(
    tmp_path: Path, entries: dict[str, Any], words: str
) -> None:
    path = saved(tmp_path, 3)
    forge(path, **entries)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert f"'{path}': manifest.json cannot be right: {words}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_signed_file_that_is_no_safetensors_is_refused_and_the_one_before_is_used(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    path = saved(tmp_path, 4)
    content = (path / "module-001.safetensors").read_bytes()
    content = b"\xff" * 8 + content[8:]  # the length of its header
    (path / "module-001.safetensors").write_bytes(content)
    files = json.loads((path / MANIFEST).read_text())["files"]
    files["module-001.safetensors"]["sha256"] = hashlib.sha256(content).hexdigest()
    forge(path, files=files)
    with pytest.raises(CheckpointError, match="module-001.safetensors is no file of a module .*header too large"):
        open_checkpoint(path)
    found, refused = newest_valid(tmp_path)
    assert found is not None and found.step == 3 and len(refused) == 1


@pytest.mark.parametrize("name", ["step", "late_since", "total_steps", "test_error_pct", "custom_network"])
def test_an_entry_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, 3)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest[name]
    (path / MANIFEST).write_text(sealed(manifest))
    with pytest.raises(CheckpointError, match=f"cannot be right: {name} is missing"):
        open_checkpoint(path)


def test_levels_are_those_chosen_for_as_many_ranks(tmp_path: Path) -> None:
    chosen = saved(tmp_path, 3, levels_together={"ranks": 2, "modules": [1, 3]})
    assert [open_checkpoint(chosen).levels_together(ranks) for ranks in (1, 2)] == [None, (1, 3)]
    assert open_checkpoint(saved(tmp_path, 4)).levels_together(2) is None


def test_a_wrong_manifest_disturbs_no_save(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    forge(saved(tmp_path, 6), step="x")
    remove_old(tmp_path, 5, keep=1, keep_best=True)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [6, 5]


@pytest.mark.parametrize("kind", ["file", "link"])
@pytest.mark.parametrize("name", [".step-00000003.partial", ".step-00000003.replaced", "step-00000003"])
def test_something_else_with_the_name_of_a_directory_blocks_no_save(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "file":
        (tmp_path / name).write_text("somebody put it there")
    else:
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    assert open_checkpoint(saved(tmp_path, 3)).step == 3
    assert open_checkpoint(saved(tmp_path, 3)).step == 3  # again, over the first one
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("step")] == ["step-00000003"]


def test_a_file_with_the_name_of_an_unfinished_checkpoint_is_removed(tmp_path: Path) -> None:
    for name in (".step-00000003.partial", ".step-00000004.removed", ".step-00000005.replaced"):
        (tmp_path / name).write_text("somebody put it there")
    assert remove_partial(tmp_path) == [".step-00000003.partial", ".step-00000004.removed"]
    assert list(tmp_path.iterdir()) == []


def test_files_that_vanish_before_the_manifest_is_written_fail_the_save(tmp_path: Path) -> None:
    files = write_module(partial_folder(tmp_path, 3), 0, STATES[0])
    (partial_folder(tmp_path, 3) / "module-000.safetensors").unlink()
    with pytest.raises(OSError, match=r"module-000\.safetensors is gone"):
        publish(tmp_path, 3, files, DOCUMENT, "", [])
    assert not step_folders(tmp_path)


def test_a_newer_format_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 3)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "format": FORMAT + 1, "localpipe": "9.9"}))
    with pytest.raises(CheckpointError, match=rf"format {FORMAT + 1}.*9\.9.*update localpipe"):
        open_checkpoint(path)
    (path / MANIFEST).write_text('["somebody", "else"]')
    with pytest.raises(CheckpointError, match="none of localpipe's"):
        open_checkpoint(path)
    (tmp_path / "other").mkdir()
    torch.save({"weight": torch.ones(1)}, tmp_path / "other" / "model.pt")
    with pytest.raises(CheckpointError, match="no manifest.json"):
        open_checkpoint(tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")


def test_the_newest_valid_one_is_found_and_the_reason_against_newer_ones_is_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        saved(tmp_path, step)
    flip(step_folder(tmp_path, 100) / "module-000.safetensors")
    found, refused = newest_valid(tmp_path)
    assert found is not None and found.step == 20
    assert len(refused) == 1 and "step-00000100" in refused[0]
    assert newest_valid(tmp_path / "nowhere") == (None, [])
    with pytest.raises(CheckpointError, match="step-00000100.*has changed.*the newest valid one is.*step-00000020"):
        open_checkpoint(tmp_path)


def test_an_unfinished_checkpoint_is_invisible_and_can_be_removed(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    write_module(partial_folder(tmp_path, 9), 0, STATES[0])
    assert [path.name for path in step_folders(tmp_path)] == ["step-00000005"]
    assert remove_partial(tmp_path) == [".step-00000009.partial"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_step_that_is_saved_again_replaces_the_old_files(tmp_path: Path) -> None:
    flip(saved(tmp_path, 5) / "config.toml")
    saved(tmp_path, 5)
    assert open_checkpoint(tmp_path / "step-00000005").step == 5
    assert len(list(tmp_path.iterdir())) == 1


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step, error in ((1, 9.0), (2, 3.0), (3, 3.0), (4, None), (5, 8.0)):
        saved(tmp_path, step, error)
    (tmp_path / "step-00000000").mkdir()  # of somebody else: no manifest
    (tmp_path / "step-00000006").mkdir()
    (tmp_path / "step-00000006" / MANIFEST).write_text('{"some": "thing"}')
    remove_old(tmp_path, 5, keep=2, keep_best=True)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [6, 5, 4, 2, 0]
    remove_old(tmp_path, 5, keep=1, keep_best=False)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [6, 5, 0]


@pytest.mark.parametrize(("better", "best"), [("higher", 2), ("lower", 4)])
def test_the_best_of_another_metric_than_error_stays(
    tmp_path: Path, better: Literal["lower", "higher"], best: int
) -> None:
    metric = Metric("iou", "IoU", lambda output, target: target, lambda sums, rows: 0.0, better=better)
    for step, value in ((1, 0.5), (2, 0.9), (3, math.nan), (4, 0.1), (5, None), (6, math.inf), (7, 0.5)):
        saved(tmp_path, step, task="Segmentation", test_cost=metric.cost(value))
    remove_old(tmp_path, 7, keep=1, keep_best=True)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [7, best]


def test_what_was_just_saved_stays_whatever_else_is_there(tmp_path: Path) -> None:
    for step in (10, 20, 15):
        saved(tmp_path, step)
    remove_old(tmp_path, 15, keep=1, keep_best=False)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [15]


def test_a_checkpoint_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames."""
    path = saved(tmp_path, 5)
    path.rename(tmp_path / ".step-00000005.replaced")
    write_module(partial_folder(tmp_path, 5), 0, STATES[0])
    assert remove_partial(tmp_path) == [".step-00000005.partial"]
    assert open_checkpoint(path).step == 5


def test_one_that_is_not_valid_can_be_set_aside(tmp_path: Path) -> None:
    set_aside(saved(tmp_path, 9))
    assert step_folders(tmp_path) == [] and (tmp_path / "step-00000009.invalid").is_dir()
