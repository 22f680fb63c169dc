"""What torchrun and the ranks that it has started on one machine tell each other by files, without torch and a store.

torchrun names a file for every rank in TORCHELASTIC_ERROR_FILE, and prints what it finds there when a rank fails:

    .../attempt_0/<local rank>/error.json      the line about the failure, and whether it was a refusal
                               process.json    who this rank is: written first of all, before torch is imported
    .../attempt_0/told                         which rank prints a line where the ranks have no store yet
    .../attempt_1/<local rank>/error.json      after a restart: a refusal is passed on, and nothing is tried again

Without torchrun none of this is there, and all functions do nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.base.errors import MARK, PeerLost
from pipeline.ranks.process import Process

FILE = "TORCHELASTIC_ERROR_FILE"
ERROR, PROCESS, TOLD = "error.json", "process.json", "told"


def watches() -> bool:
    """Whether torchrun has started this process and looks at its files."""
    return _folder() is not None


def register() -> None:
    """Let the other ranks of this machine know this process."""
    folder = _folder()
    if folder is not None:
        _write(folder / PROCESS, asdict(Process.current("starting")))


def siblings() -> dict[int, Process]:
    """The other ranks of this attempt under the same torchrun that have registered."""
    folder, found = _folder(), {}
    for path in folder.parent.glob(f"*/{PROCESS}") if folder is not None else ():
        document = _read(path)
        if path.parent != folder and document is not None:
            found[_first_rank() + int(path.parent.name)] = Process(**document)
    return found


def check_siblings() -> None:
    """Raises PeerLost: another rank of this machine has ended while it started."""
    for rank, process in siblings().items():
        if process.gone():
            raise PeerLost(
                rank, f"rank {rank} died without a message while it started (killed? out of memory?)"
            )


def elected() -> bool:
    """Whether this rank is the first one of its machine to ask, and so to print."""
    folder = _folder()
    if folder is None:
        return True
    try:
        with open(folder.parent / TOLD, "x"):
            return True
    except FileExistsError:
        return False
    except OSError:
        return True


def tell(line: str, refused: bool) -> None:
    """Let torchrun end its report with ``line``; ``refused``: a restart would end in the same way."""
    folder = _folder()
    if folder is not None:
        text = line.removeprefix(MARK)  # the line itself is printed once
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        _write(folder / ERROR, {"message": {"message": text, "extraInfo": extra}, "refused": refused})


def refused_before() -> bool:
    """Whether the attempt before this one was refused; why is passed on to the next one."""
    folder = _folder()
    if folder is None:
        return False
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    for path in sorted((folder.parent.parent / f"attempt_{count - 1}").glob(f"*/{ERROR}")):
        document = _read(path)
        if document is not None and document.get("refused"):
            tell(str(document["message"]["message"]), refused=True)
            return True
    return False


def _folder() -> Path | None:
    """Of this rank in this attempt."""
    name = os.environ.get(FILE)
    folder = Path(name).parent if name else None
    return folder if folder is not None and folder.parent.name.startswith("attempt_") else None


def _first_rank() -> int:
    """The rank of the first process under this torchrun."""
    return int(os.environ.get("RANK", "0")) - int(os.environ.get("LOCAL_RANK", "0"))


def _write(path: Path, document: dict[str, Any]) -> None:
    """In one go, or not at all: a full disk must not hide the cause."""
    with contextlib.suppress(OSError):
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(document))
        os.replace(partial, path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None
