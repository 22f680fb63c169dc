"""Checkpoints on disk: one directory per step, in it one file of safetensors per local module, and one manifest.

    checkpoints/
      .step-00000012.partial/     being written; nobody reads it
      step-00000008/              complete: it got this name in one rename, after everything in it was on the disk
        manifest.json             position, what was trained, SHA-256 and size of every other file
        config.toml               the configuration
        history.json              records of the finished epochs
        module-000.safetensors    local module 0: weights, heads, optimiser, late work (module_state)
        ...

A module's file does not depend on the rank that wrote it, so a run may go on with other ranks. safetensors protects
neither against flipped bits nor against a mixture of two saves; the manifest does. All of it is JSON, TOML and numbers:
reading it executes nothing. Checkpoints of format 1 (older_format) can be read, but are not written any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.base.config import Config
from pipeline.base.errors import CheckpointError
from pipeline.base.validation import from_dict, validate
from pipeline.local.task import task_name
from pipeline.local.weights import averages_of
from pipeline.store.manifest import (
    CONFIG,
    FORMAT,
    HISTORY,
    MANIFEST,
    STEP_NAME,
    module_file,
    module_folder,
    part_file,
    read_manifest,
    sealed,
)
from pipeline.store.module_file import check_state, read_state, write_state

FOLDER = "checkpoints"
_PARTIAL = re.compile(r"\.step-\d{8,}\.(partial|removed)")
_REPLACED = re.compile(r"\.(step-\d{8,})\.replaced")

Files = dict[str, dict[str, Any]]
"""Path below the checkpoint -> {"sha256", "bytes"}."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the complete checkpoint of ``step`` steps is."""
    return checkpoints / f"step-{step:08d}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Where it is while it is written."""
    return checkpoints / f".step-{step:08d}.partial"


# --- writing ----------------------------------------------------------------------------------------------------------


def write_module(partial: Path, index: int, state: dict[str, Tensor]) -> Files:
    """Write the state of one local module and return its files. Raises OSError."""
    return _write_state(partial, module_file(index), state)


def write_part(partial: Path, index: int, replica: int, state: dict[str, Tensor]) -> Files:
    """Likewise what only ``replica``, not the first, knows of it."""
    return _write_state(partial, part_file(index, replica), state)


def _write_state(partial: Path, name: str, state: dict[str, Tensor]) -> Files:
    _make_way(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_state(partial / name, state)
    return {name: _digest(partial / name)}


def publish(
    checkpoints: Path, step: int, files: Files, document: Mapping[str, Any], config_toml: str, history: Sequence[Any]
) -> Path:
    """Write what is left, the manifest last, and give the directory its name. Returns it. Raises OSError."""
    partial, final = partial_folder(checkpoints, step), step_folder(checkpoints, step)
    lost = next((name for name in files if not (partial / name).is_file()), None)
    if lost is not None:
        raise OSError(f"{lost} is gone; were the checkpoints deleted or renamed while they were written?")
    _write(partial / CONFIG, config_toml)
    _write(partial / HISTORY, json.dumps(history) + "\n")
    every = {**files, **{name: _digest(partial / name) for name in (CONFIG, HISTORY)}}
    _write(partial / MANIFEST, sealed({**document, "step": step, "files": every}))
    _sync(partial)
    if os.path.lexists(final):  # of the same step, before the test of its epoch
        replaced = checkpoints / f".{final.name}.replaced"
        _remove(replaced)
        os.rename(final, replaced)
        os.rename(partial, final)
        _remove(replaced)
    else:
        os.rename(partial, final)
    _sync(checkpoints)
    return final


def remove_partial(checkpoints: Path) -> list[str]:
    """Remove what killed runs left unfinished; returns the names. What was about to be replaced is put back."""
    for path in _entries(checkpoints):
        match = _REPLACED.fullmatch(path.name)
        if match is not None:
            if (checkpoints / match[1]).exists() or not path.is_dir():
                _remove(path)
            else:
                os.rename(path, checkpoints / match[1])
    found = [path for path in _entries(checkpoints) if _PARTIAL.fullmatch(path.name)]
    for path in found:
        _remove(path)
    return sorted(path.name for path in found)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that is not valid, so that it counts no more; returns its new place."""
    aside = path.with_name(f"{path.name}.invalid")
    _remove(aside)
    os.rename(path, aside)
    return aside


def remove_old(checkpoints: Path, newest: int, keep: int, keep_best: bool) -> None:
    """Remove all but the ``keep`` last ones up to that of step ``newest``, which is on the disk, and, with
    ``keep_best``, the one with the best test: the smallest error, or the best value of the task's first metric.
    Raises OSError."""
    steps, errors = {}, {}
    for path in step_folders(checkpoints):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue  # not ours to remove
        steps[path], errors[path] = manifest["step"], manifest.get("test_cost", manifest["test_error_pct"])
    stay = set([path for path, step in steps.items() if step <= newest][:keep])
    tested = [path for path, error in errors.items() if error is not None]
    if keep_best and tested:
        stay.add(min(tested, key=lambda path: (errors[path], steps[path])))
    for path in steps.keys() - stay:
        removed = path.with_name(f".{path.name}.removed")  # no half of it is ever seen
        _remove(removed)
        os.rename(path, removed)
        _remove(removed)


# --- reading ----------------------------------------------------------------------------------------------------------


def step_folders(checkpoints: Path) -> list[Path]:
    """Directories of complete checkpoints, the newest first."""
    found = {int(match[1]): path for path in _entries(checkpoints) if (match := STEP_NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint. ``manifest`` as in manifest.json."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Training steps done."""
        return int(self.manifest["step"])

    @property
    def epoch(self) -> int:
        """The epoch of the last step, 1-based."""
        return int(self.manifest["epoch"])

    @property
    def config(self) -> Config:
        """The configuration it was written with. Raises CheckpointError for one that this version does not know."""
        try:
            return validate(from_dict(tomllib.loads((self.path / CONFIG).read_text(encoding="utf-8"))))
        except ValueError as error:  # ConfigError and TOMLDecodeError are
            raise CheckpointError(f"checkpoint '{self.path}': {CONFIG} cannot be used: {error}") from error

    @property
    def module_names(self) -> list[list[str]]:
        """Block names of every local module, in order."""
        modules: list[list[str]] = self.manifest["modules"]
        return modules

    @property
    def task(self) -> str:
        """The name of the task."""
        return str(self.manifest.get("task", task_name(None)))

    @property
    def classes(self) -> int:
        """Number of classes of the task."""
        return int(self.manifest["classes"])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.manifest["image_shape"])

    @property
    def custom_network(self) -> bool:
        """Whether the network was a user's own, which no name can rebuild."""
        return bool(self.manifest["custom_network"])

    def levels_together(self, ranks: int) -> tuple[int, ...] | None:
        """The local modules with both levels together, if they have been chosen (``hierarchy.levels = "auto"``) for so
        many ranks."""
        chosen = self.manifest.get("levels_together")
        return tuple(chosen["modules"]) if chosen is not None and chosen["ranks"] == ranks else None

    def history(self) -> list[dict[str, Any]]:
        """Records of the finished epochs, as dicts."""
        records: list[dict[str, Any]] = json.loads((self.path / HISTORY).read_text())
        return records

    def module_state(self, index: int) -> dict[str, Tensor]:
        """The state of local module ``index`` as :func:`pipeline.local.module_state.module_state` made it, on the CPU.

        Raises:
            CheckpointError: its file cannot be read.
        """
        if self.manifest["format"] < FORMAT:
            from pipeline.store.older_format import read_older_state  # a second of imports that few need

            return read_older_state(self.path / module_folder(index))
        return read_state(self.path / module_file(index))

    def averages(self, index: int) -> dict[str, Tensor]:
        """The moving averages of the weights of local module ``index``, called as the weights.

        Raises:
            CheckpointError: its file cannot be read, or the run keeps none.
        """
        found = averages_of(self.module_state(index))
        if not found:
            raise CheckpointError(
                f"checkpoint '{self.path}' has no moving averages of weights: train.ema = "
                f"{self.config.train.ema:g}; train with train.ema=0.999, or leave --ema out"
            )
        return found

    def parts(self, index: int) -> list[dict[str, Tensor]]:
        """What the replicas but the first have saved of local module ``index``; mostly nothing (see
        :mod:`pipeline.local.late_parts`)."""
        names = (part_file(index, replica) for replica in itertools.count(1))
        found = itertools.takewhile(self.manifest["files"].__contains__, names)
        return [read_state(self.path / name) for name in found]

    @property
    def older(self) -> str | None:
        """What to tell somebody who uses a checkpoint of an older format; None for one of today's."""
        version = self.manifest["format"]
        if version >= FORMAT:
            return None
        return (
            f"checkpoint '{self.path}' has format {version} (localpipe {self.manifest['localpipe']}), which is still "
            f"read; new ones have format {FORMAT}"
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose files are all there and have the bytes that were written.

    Args:
        path: the directory of a step, or a run directory, of which it takes the newest checkpoint.

    Raises:
        CheckpointError: names the file that is missing, cut short, changed, of a newer format or of another program.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"checkpoint '{path}' does not exist; give a run directory or a step directory")
    for folder in (path / FOLDER, path):
        if step_folders(folder):
            found, refused = newest_valid(folder)
            if refused:
                older = f"the newest valid one is '{found.path}'" if found else "no other one is valid"
                raise CheckpointError(f"{refused[0]}; {older}")
            if found is not None:
                return found
    return _open(path)


def open_verified(path: Path) -> Checkpoint:
    """A checkpoint that somebody has verified already. Raises CheckpointError where it is not to be seen from here."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint '{path}' cannot be seen here; all machines must see the same files")
    return Checkpoint(path, read_manifest(path))


def newest_valid(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is valid, or None, and why newer ones are not."""
    refused: list[str] = []
    for path in step_folders(checkpoints):
        try:
            return _open(path), refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, refused


def _open(path: Path) -> Checkpoint:
    manifest = read_manifest(path)
    where, fix = f"checkpoint '{path}'", "use another one"
    for name, expected in manifest["files"].items():
        try:
            found = _digest(path / name)
        except OSError as error:
            raise CheckpointError(f"{where}: {name} cannot be read ({error.strerror}); {fix}") from error
        if found["bytes"] != expected["bytes"]:
            raise CheckpointError(
                f"{where}: {name} has {found['bytes']} bytes, {expected['bytes']} were written (cut short?); {fix}"
            )
        if found["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{where}: {name} has changed since it was written (SHA-256 differs); {fix}")
    if manifest["format"] == FORMAT:
        for index in range(len(manifest["modules"])):
            check_state(path / module_file(index))
    return Checkpoint(path, manifest)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": os.fstat(file.fileno()).st_size}


def _make_way(folder: Path) -> None:
    """Something else may have the name of a directory that is to be made, such as a file that a user has put there."""
    if not folder.is_dir():  # another rank may be quicker, and the directory be there by now
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            folder.unlink()


def _remove(path: Path) -> None:
    """A directory with all that is in it, or a file, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a directory survive a power cut, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
