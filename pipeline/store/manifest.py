"""manifest.json of a checkpoint: what it says, of which type and in which range, and how its parts agree.

    epoch           1          2          3           an epoch has train_batches steps, the last one may be cut short by
    steps      |----------|----------|------ .|       total_steps
    step                        ^                     epoch 2, finished_epochs 1;  late_since <= step
               a step at the end of an epoch: finished_epochs is one less before the test of this epoch

A manifest has a digest of itself, which tells accidents but no program that writes nonsense and signs it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from pipeline.base.errors import CheckpointError

FORMAT = 2
"""Of the files; a reader refuses what is newer. 1: module-000/ was a torch.distributed.checkpoint."""
MANIFEST, CONFIG, HISTORY = "manifest.json", "config.toml", "history.json"
STEP_NAME = re.compile(r"step-(\d{8,})")


def module_file(index: int) -> str:
    """Where the state of local module ``index`` is, below a checkpoint."""
    return f"{module_folder(index)}.safetensors"


def part_file(index: int, replica: int) -> str:
    """Where what only ``replica``, not the first, knows of a late module is."""
    return f"{module_folder(index)}.replica-{replica}.safetensors"


def module_folder(index: int) -> str:
    """Where it is in format 1."""
    return f"module-{index:03d}"


def sealed(document: Mapping[str, Any]) -> str:
    """The text of manifest.json: ``document``, its format and a digest of both."""
    manifest = {"format": FORMAT, **document}
    return json.dumps({**manifest, "sha256": _self_digest(manifest)}, indent=1) + "\n"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in a directory. It does not look at the other files.

    Raises:
        CheckpointError: it is missing, of another program, of a newer format or changed; an entry is missing, has
            another type or is out of its range; entries contradict each other.
    """
    where, fix = f"checkpoint '{checkpoint}'", "use another one"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{where} has no {MANIFEST}: not written by localpipe, or not to its end") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: {MANIFEST} cannot be read ({error}); {fix}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict) or not _whole(version, 1) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{where}: {MANIFEST} is none of localpipe's; {fix}")
    if version > FORMAT:
        raise CheckpointError(
            f"{where} has format {version}, written by localpipe {manifest.get('localpipe')}; this version reads up to "
            f"{FORMAT}: update localpipe"
        )
    if manifest.get("sha256") != _self_digest(manifest):
        raise CheckpointError(f"{where}: {MANIFEST} has changed since it was written (SHA-256 differs); {fix}")
    problem = _wrong_entry(manifest) or _contradiction(manifest, checkpoint)
    if problem is not None:
        raise CheckpointError(f"{where}: {MANIFEST} cannot be right: {problem}; {fix}")
    return manifest


# --- entries ----------------------------------------------------------------------------------------------------------


def _whole(value: Any, least: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any, least: float, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and (
        least <= value <= most
    )


def _modules(value: Any) -> bool:
    lists = isinstance(value, list) and all(isinstance(names, list) and names for names in value)
    names = [name for module in value for name in module] if lists else []
    return bool(names) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _shape(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_whole(size, 1) for size in value)


def _levels(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _whole(value.get("ranks"), 1)
        and isinstance(value.get("modules"), list)
        and all(_whole(module, 0) for module in value["modules"])
    )


def _files(value: Any) -> bool:
    def known(name: str, entry: Any) -> bool:
        path = PurePosixPath(name)
        return (
            not path.is_absolute()
            and ".." not in path.parts
            and isinstance(entry, dict)
            and _whole(entry.get("bytes"), 0)
            and re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))) is not None
        )

    return bool(value) and all(known(name, entry) for name, entry in value.items())


_FROM_0 = (lambda value: _whole(value, 0), "a whole number from 0 on")
_FROM_1 = (lambda value: _whole(value, 1), "a whole number from 1 on")
_TEXT = (lambda value: isinstance(value, str), "a text")
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "localpipe": _TEXT,
    "versions": (lambda value: isinstance(value, dict), "a table"),
    "date": _TEXT,
    "step": _FROM_1,
    "epoch": _FROM_1,
    "finished_epochs": _FROM_0,
    "late_since": _FROM_0,
    "images": _FROM_0,
    "wall_s": (lambda value: _number(value, 0), "a number of seconds from 0 on"),
    "total_steps": _FROM_1,
    "train_batches": _FROM_1,
    "modules": (_modules, "a list of the block names of every local module, each of them once"),
    "classes": _FROM_1,
    "image_shape": (_shape, "a list of whole numbers from 1 on"),
    "custom_network": (lambda value: isinstance(value, bool), "true or false"),
    "config_sha256": _TEXT,
    "test_error_pct": (lambda value: value is None or _number(value, 0, 100), "null or a number from 0 to 100"),
    "task": _TEXT,
    "test_cost": (lambda value: value is None or _number(value, -math.inf), "null or a number"),
    "levels_together": (_levels, "a number of ranks and a list of local modules"),
    "files": (_files, "a table of at least one file, each with its SHA-256 and its bytes"),
}


_OPTIONAL = ("task", "test_cost", "levels_together")
"""Of tasks other than classification: their name, and the first metric so that lower is better. With
``hierarchy.levels = "auto"``: what was chosen for so many ranks."""


def _wrong_entry(manifest: Mapping[str, Any]) -> str | None:
    for name, (fits, wanted) in _ENTRIES.items():
        if name not in manifest:
            if name in _OPTIONAL:
                continue
            return f"{name} is missing"
        if not fits(manifest[name]):
            return f"{name} = {json.dumps(manifest[name])[:80]}, which must be {wanted}"
    return None


def _contradiction(manifest: Mapping[str, Any], checkpoint: Path) -> str | None:
    step, epoch, finished = manifest["step"], manifest["epoch"], manifest["finished_epochs"]
    batches, total, late = manifest["train_batches"], manifest["total_steps"], manifest["late_since"]
    named = STEP_NAME.fullmatch(checkpoint.name)
    if named is not None and int(named[1]) != step:
        return f"step = {step}, its directory is of step {int(named[1])}"
    if step > total:
        return f"step = {step} is after the last one, total_steps = {total}"
    if epoch != -(-step // batches):
        return f"step = {step} is not in epoch = {epoch} of train_batches = {batches} steps each"
    ends = step == min(epoch * batches, total)
    if finished != epoch - 1 and not (ends and finished == epoch):
        return f"finished_epochs = {finished} does not go with step = {step} of epoch = {epoch}"
    if late > step:
        return f"late_since = {late} is after step = {step}"
    place = module_file if manifest["format"] > 1 else module_folder
    files = [CONFIG, HISTORY, *(place(index) for index in range(len(manifest["modules"])))]
    there = {PurePosixPath(name).parts[0] for name in manifest["files"]}
    missing = [name for name in files if name not in there]
    return f"files has none of {missing[0]}" if missing else None


def _self_digest(manifest: Mapping[str, Any]) -> str:
    """Of a manifest without the digest of itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
