"""Checkpoints of format 1: the state of a local module as a torch.distributed.checkpoint, which nobody writes any more.

    module-000/.metadata        a pickle of torch's: names, dtypes, shapes, places
    module-000/__0_0.distcp     the tensors

A pickle may name any function of any package and have it called. Here it may name what torch writes there and nothing
else, so that reading executes no more than reading the files of today.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pipeline.base.errors import CheckpointError
from pipeline.local.weights import State

_OF_TORCH = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # from Python 3.13 on
}


def read_older_state(folder: Path) -> State:
    """The state of a local module that format 1 keeps in ``folder``, contiguous on the CPU.

    Raises:
        CheckpointError: the files cannot be read, or hold anything but tensors.
    """
    try:
        reader = _Reader(folder)
        state: dict[str, Any] = {}
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is no tensor")
            state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():  # that one process per module reads is meant so
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (Exception, dcp.api.CheckpointException) as error:  # a broken pickle may raise anything, torch no Exception
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"checkpoint '{folder.parent}': {folder.name} is no state of a module ({why}); use another one"
        ) from error
    return state


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            _OnlyOfTorch(file).load()
        return super().read_metadata(*args, **kwargs)


class _OnlyOfTorch(pickle.Unpickler):
    """Refuses before it imports."""

    def find_class(self, module: str, name: str) -> Any:
        of_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if of_dtype or name in _OF_TORCH.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
