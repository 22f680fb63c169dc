"""The state of one local module as one file of the format safetensors: a length, a header in JSON, bytes of tensors.

    | 8 bytes: n | n bytes of JSON: {name: {dtype, shape, place}, ..., "__metadata__": {"names": ...}} | tensors |

Reading it executes nothing. The library checks the header before a tensor is made: its length, every dtype and shape,
and that the tensors fill the rest of the file without gap or overlap. It sorts the tensors; their names are kept in the
order of the state, which is that of the un-cut network and of the records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.base.errors import CheckpointError
from pipeline.local.weights import State

NAMES = "names"


def write_state(path: Path, state: State) -> None:
    """Write ``state``, tensors on the CPU that share no memory; it is on the disk when this returns.

    The interpreter is free meanwhile, and no copy is made but of tensors that are not contiguous. Raises OSError.
    """
    tensors = {name: value.contiguous() for name, value in state.items()}
    try:
        save_file(tensors, path, {"format": "pt", NAMES: json.dumps(list(state))})
    except SafetensorError as error:  # its text ends with what the system says
        raise OSError(str(error)) from error
    with open(path, "rb") as file:
        os.fchmod(file.fileno(), path.parent.stat().st_mode & 0o666)  # the library's temporary file is for one user
        os.fsync(file.fileno())


def read_state(path: Path) -> State:
    """A state of :func:`write_state`, contiguous on the CPU.

    Raises:
        CheckpointError: the file cannot be read or is not one of ours.
    """
    with _opened(path) as (file, names):
        # A copy begins where torch lets tensors begin: in the file it may be any byte, and kernels look at it.
        return {name: file.get_tensor(name).clone() for name in names}


def check_state(path: Path) -> None:
    """Whether :func:`read_state` can read it, from its header alone. Raises CheckpointError."""
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """The file and the names in it, in the order of the state."""
    try:
        # Not mapped into memory: where the disk fails, that would kill the process.
        with safe_open(path, framework="pt", backend="pread") as file:
            names = json.loads((file.metadata() or {}).get(NAMES, "null"))
            if not isinstance(names, list) or sorted(map(str, names)) != sorted(file.keys()):
                raise ValueError("its list of names is not that of its tensors")
            yield file, names
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of a dtype torch cannot make
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"checkpoint '{path.parent}': {path.name} is no file of a module ({why}); use another one"
        ) from error
