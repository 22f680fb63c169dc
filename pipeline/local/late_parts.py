"""What only one replica knows of a late module (schedule `async`), and how others take it over.

    replica 0   module-000.safetensors                the state of the module, with its own rows of batches in flight
    replica 1   module-000.replica-1.safetensors      its rows of them, losses and gradients of heads not averaged yet

On as many replicas each goes on with its own. On any other number the rows of a batch in flight are put together in
their order and divided anew; what is a sum over rows goes to the first replica, and the others get zeros.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.local.weights import State

STRIDES = "@strides"
"""Behind a name: in which a tensor of four dimensions lies decides which kernels work on it, so on the last bits."""
_ROWS = re.compile(r"late\.(\d+)\.batch\.(\d+)\.(.+)")
_SUMS = re.compile(r"open\.\d+\..+|late\.\d+\.head_gradient\.\d+")
_STATISTICS = (".running_mean", ".running_var")  # between two updates those of the replica


def own_part(state: State) -> State:
    """What of the state of a late module differs between replicas."""
    return {
        name: value
        for name, value in state.items()
        if _ROWS.fullmatch(name) or _SUMS.fullmatch(name.removesuffix(STRIDES)) or name.endswith(_STATISTICS)
    }


def shared_out(state: State, others: Sequence[State], replica: int, replicas: int, micro_batches: int) -> State:
    """The state of a late module for one of ``replicas``.

    Args:
        state: that the first replica has saved.
        others: the parts of the other ones that have saved.
        micro_batches: of a batch, in each replica.
    """
    parts = [own_part(state), *others]
    if len(parts) == replicas and replica > 0:
        return {name: value for name, value in state.items() if name not in parts[0]} | parts[replica]
    if len(parts) == replicas:
        return state
    found = {name: value for name, value in state.items() if name not in parts[0] or name.endswith(_STATISTICS)}
    for name, first in parts[0].items():
        if _SUMS.fullmatch(name):
            total = first.clone()
            for part in others:
                total += part[name]
            found[name] = total if replica == 0 else torch.zeros_like(total)
        elif _SUMS.fullmatch(name.removesuffix(STRIDES)):
            found[name] = first
    for step, rows in _batches(parts).items():
        count = len(rows["labels"])
        for field, tensor in rows.items():
            of_replica = tensor if field.endswith(STRIDES) else torch.tensor_split(tensor, replicas)[replica]
            for number in range(micro_batches):
                name = f"late.{step}.batch.{number}.{field}"
                mine = of_replica if field.endswith(STRIDES) else torch.tensor_split(of_replica, micro_batches)[number]
                found[name] = mine
                if field == "labels":
                    scale = torch.tensor(len(mine) / count, dtype=torch.float64)
                    found[f"late.{step}.batch.{number}.scale"] = scale
    return found


def _batches(parts: Sequence[State]) -> dict[int, dict[str, Tensor]]:
    """By step and field, all rows of the batches in flight, in order; of strides the first ones."""
    pieces: dict[int, dict[str, list[tuple[int, int, Tensor]]]] = {}
    for replica, part in enumerate(parts):
        for name, value in part.items():
            match = _ROWS.fullmatch(name)
            if match is not None and match[3] != "scale":
                place = (replica, int(match[2]), value)
                pieces.setdefault(int(match[1]), {}).setdefault(match[3], []).append(place)
    batches: dict[int, dict[str, Tensor]] = {}
    for step, fields in pieces.items():
        ordered = {field: [piece[2] for piece in sorted(found, key=lambda p: p[:2])] for field, found in fields.items()}
        batches[step] = {
            field: tensors[0] if field.endswith(STRIDES) else torch.cat(tensors) for field, tensors in ordered.items()
        }
    return batches
