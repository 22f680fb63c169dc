"""The one writer of .pt files of weights, model.pt and heads.pt of a run and exports: a flat dict of tensors, whole or
not at all.

    dict --> bytes --> temporary file --> fsync --> rename
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from pipeline.local.weights import State
from pipeline.store.atomic import write_atomically

MODEL, HEADS = "model.pt", "heads.pt"


def encode_pt(state: State) -> bytes:
    """As ``torch.save`` writes it. Tensors only: ``torch.load(file, weights_only=True)`` reads it."""
    buffer = io.BytesIO()  # torch's own writing to files hides why a disk refuses
    torch.save(state, buffer)
    return buffer.getvalue()


def write_weights(target: Path, state: State) -> None:
    """Write ``state`` as a .pt file. Raises OSError."""
    content = encode_pt(state)
    write_atomically(target, lambda file: file.write(content))
