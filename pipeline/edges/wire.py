"""The wire format: what one message between two ranks looks like in memory. Knows no model.

A message is ONE flat uint8 buffer, always sent in full so that both ends agree on the count (short messages
pass silently, long ones abort the receiver):

    | header: 16 int64 words, 128 B | lengths | field 0: max_rows rows | pad to 64 B | field 1 | ...

Lengths: one int64 word for every axis that varies from message to message, padded to 64 B; nothing where none does. A
shorter message fills its fields from their start, without gaps: a tensor has the same strides, and so the same bits
follow from it, whether or not it has crossed an edge.

Where the bytes live (:class:`Slot`):

    CPU                     wire, gloo:  | header | fields |     the fields are views of it
    ranks sharing a GPU     wire, gloo:  | header | fields |     pinned host memory, with a twin on the device
    NCCL                    wire, gloo:  | header |              payload, NCCL: | fields |, on the device
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import torch

from pipeline.base.errors import WireError

MAGIC = 0x6C6F63616C706970  # "localpip"
WORDS = 16
HEADER_BYTES = 8 * WORDS
ALIGN = 64
FOREVER = timedelta(days=7)
"""For waits in daemon threads: the deadline of the main thread governs, not the group's."""


class MessageKind(IntEnum):
    """What a message carries. EPOCH marks the end of an epoch (schedule `free`), DONE that of the stream. WEIGHTS are
    those of the step that the header names."""

    TRAIN = 1
    EVAL = 2
    GRADIENT = 3
    DONE = 4
    EPOCH = 5
    WEIGHTS = 6


class Directive(IntEnum):
    """What every stage is to do after the step of a message. The first stage decides; it travels with the batch, so all
    stages do it after the same step, and no step asks a store."""

    GO = 0
    SAVE = 1
    STOP = 2


@dataclass(frozen=True)
class Header:
    """Which message this is.

    ``rows``: how many rows of each field are filled. ``key``, ``batch_rows`` (rows of the whole batch that this
    micro-batch is a part of) and ``directive`` are carried for the caller.
    """

    kind: MessageKind
    epoch: int
    step: int
    micro_batch: int
    key: int = 0
    rows: int = 0
    batch_rows: int = 0
    directive: Directive = Directive.GO

    def __str__(self) -> str:
        return f"epoch {self.epoch} step {self.step} micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class FieldSpec:
    """One tensor of a message, (rows, *shape_per_row); ``channels_last`` (4-D only) travels as NHWC bytes.

    ``varies``: axes of ``shape_per_row`` that may be shorter in a message.
    """

    name: str
    dtype: torch.dtype
    shape_per_row: tuple[int, ...]
    channels_last: bool = False
    varies: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.channels_last and len(self.shape_per_row) != 3:
            raise WireError(
                f"field {self.name!r}: channels_last needs (C, H, W) per row, got {self.shape_per_row}"
            )

    def nbytes(self, rows: int) -> int:
        """Bytes of ``rows`` rows."""
        return rows * self.dtype.itemsize * torch.Size(self.shape_per_row).numel()

    def fits(self, shape_per_row: tuple[int, ...]) -> bool:
        """Whether rows of this shape can travel: axes that vary are no longer than the maximum."""
        return len(shape_per_row) == len(self.shape_per_row) and all(
            size == most or (axis in self.varies and size < most)
            for axis, (size, most) in enumerate(zip(shape_per_row, self.shape_per_row, strict=True))
        )

    def lengths(self, shape_per_row: tuple[int, ...]) -> list[int]:
        """Of the axes that vary."""
        return [shape_per_row[axis] for axis in self.varies]

    def at_lengths(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """The inverse of :meth:`lengths`."""
        shape = list(self.shape_per_row)
        for axis, length in zip(self.varies, lengths, strict=True):
            shape[axis] = length
        return tuple(shape)

    def view(self, flat: torch.Tensor, rows: int, shape_per_row: tuple[int, ...]) -> torch.Tensor:
        """The first ``rows`` rows in ``flat``, the field's bytes, laid out for rows of ``shape_per_row``."""
        size = rows * torch.Size(shape_per_row).numel() * self.dtype.itemsize
        values = flat[:size].view(self.dtype)
        if self.channels_last:
            c, h, w = shape_per_row
            return values.view(rows, h, w, c).permute(0, 3, 1, 2)
        return values.view(rows, *shape_per_row)

    def __str__(self) -> str:
        layout = " channels_last" if self.channels_last else ""
        sizes = [f"up to {size}" if axis in self.varies else str(size) for axis, size in enumerate(self.shape_per_row)]
        shape = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} {shape}{layout}"


@dataclass(frozen=True)
class MessageSpec:
    """The fields of every message on one edge, and the most rows one message can carry."""

    fields: tuple[FieldSpec, ...]
    max_rows: int

    @property
    def header_bytes(self) -> int:
        """Header and lengths."""
        return HEADER_BYTES + _aligned(8 * sum(len(field.varies) for field in self.fields))

    @property
    def nbytes(self) -> int:
        """Size of every message on the wire, header included."""
        return self.header_bytes + sum(_aligned(field.nbytes(self.max_rows)) for field in self.fields)

    def fingerprint(self) -> int:
        """63-bit number, the same on every machine, that any other name, dtype or shape changes."""
        return int.from_bytes(hashlib.sha256(self.describe().encode()).digest()[:8], "big") >> 1

    def describe(self) -> str:
        """One line, e.g. ``64 rows of activation bfloat16 (16, 32, 32) channels_last + labels int64 ()``."""
        return f"{self.max_rows} rows of " + " + ".join(map(str, self.fields))

    def flat(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The bytes of each field in ``buffer``, uint8 (nbytes,)."""
        parts = {}
        offset = self.header_bytes
        for field in self.fields:
            parts[field.name] = buffer[offset : offset + field.nbytes(self.max_rows)]
            offset += _aligned(field.nbytes(self.max_rows))
        return parts

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views (max_rows, *shape_per_row) of each field into ``buffer``, uint8 (nbytes,).

        Channels-last views have the strides of ``torch.empty(shape, memory_format=torch.channels_last)``.
        """
        flat = self.flat(buffer)
        return {field.name: field.view(flat[field.name], self.max_rows, field.shape_per_row) for field in self.fields}

    def lengths(self, tensors: dict[str, torch.Tensor]) -> list[int]:
        """Of all axes that vary, in the order of the fields; 0 of a field that is left out."""
        return [
            length
            for field in self.fields
            for length in (
                field.lengths(tuple(tensors[field.name].shape[1:]))
                if field.name in tensors
                else [0] * len(field.varies)
            )
        ]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


class Slot:
    """One preallocated message: header on the host, fields on the compute device.

    The main thread queues work of the device on the fields and never waits for it: a thread beside it does, before
    anything else may touch them.

    Args:
        spec: of the message.
        device: of the fields.
        split: the header travels alone, the fields as a payload.
        copies: ranks that share a GPU: on which stream the fields go between device and host, for the thread beside.

    Attributes:
        wire: what gloo carries, uint8 on the host.
        payload: where it carries no fields, those, uint8 on ``device``.
        words: the header, int64, a view of ``wire``.
    """

    def __init__(self, spec: MessageSpec, device: torch.device, split: bool, copies: torch.cuda.Stream | None) -> None:
        staged = copies is not None
        nbytes = spec.header_bytes if split else spec.nbytes
        self.wire = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=staged)
        self.words = self.wire[: spec.header_bytes].view(torch.int64)
        local = torch.zeros(spec.nbytes, dtype=torch.uint8, device=device) if split or staged else self.wire
        self.payload = local[spec.header_bytes :]
        self._spec = spec
        self._flat = spec.flat(local)
        self._views = spec.views(local)
        self._used = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self._copies = copies
        self.queued()

    @torch.no_grad()
    def pack(self, words: Sequence[int], rows: int, tensors: dict[str, torch.Tensor]) -> None:
        """Fill header and fields; call :meth:`leave` before it is sent."""
        lengths = self._spec.lengths(tensors)
        for name, view in self._at(rows, tensors.keys(), lengths).items():
            view.copy_(tensors[name])
        header = [*words, *[0] * (WORDS - len(words)), *lengths]
        self.words[: len(header)].copy_(torch.tensor(header))
        self.queued()

    def queued(self) -> None:
        """All that is to touch the fields is queued on the current stream."""
        if self._used is not None:
            self._used.record()

    def settle(self) -> None:
        """Block this thread until the device is through with what was :meth:`queued`."""
        if self._used is not None:
            self._used.synchronize()

    def leave(self) -> None:
        """:meth:`settle`, then block until the bytes are where they are sent from."""
        self.settle()
        self._stage(to_wire=True)

    def arrive(self) -> None:
        """Of a message that has come: block this thread until its fields are where every stream may read them."""
        self._stage(to_wire=False)

    def has_fields(self) -> bool:
        """Whether the message carries any."""
        return int(self.words[3]) != 0

    def unpack(self, rows: int) -> dict[str, torch.Tensor]:
        """Views of the first ``rows`` rows of the fields present."""
        present = int(self.words[3])
        names = {field.name for bit, field in enumerate(self._spec.fields) if present >> bit & 1}
        return self._at(rows, names, self.words[WORDS:].tolist())

    def _stage(self, to_wire: bool) -> None:
        """Ranks that share a GPU: copy the fields between device and host, beside what the main thread computes."""
        if self._copies is not None and self.has_fields():
            there, here = self.wire[self._spec.header_bytes :], self.payload
            with torch.cuda.stream(self._copies):
                (there if to_wire else here).copy_(here if to_wire else there, non_blocking=True)
            self._copies.synchronize()  # gloo's threads know no stream

    def _at(self, rows: int, names: Collection[str], lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        """The first ``rows`` rows of the fields ``names``, where axes that vary have ``lengths``."""
        views = {}
        start = 0
        for field in self._spec.fields:
            end = start + len(field.varies)
            if field.name in names:
                views[field.name] = (
                    field.view(self._flat[field.name], rows, field.at_lengths(lengths[start:end]))
                    if field.varies
                    else self._views[field.name][:rows]
                )
            start = end
        return views
