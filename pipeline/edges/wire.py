"""The wire format: what one message between two ranks looks like in memory. Knows no model.

A message is ONE flat uint8 buffer, always sent in full so that both ends agree on the count (short messages
pass silently, long ones abort the receiver):

    | header: 16 int64 words, 128 B | lengths | field 0: max_rows rows | pad to 64 B | field 1 | ...

Lengths: one int64 word for every axis that varies from message to message, padded to 64 B; nothing where none does. A
shorter message fills its fields from their start, without gaps: a tensor has the same strides, and so the same bits
follow from it, whether or not it has crossed an edge.

Where the bytes live: CPU or NCCL - the buffer the fields are views of is the buffer on the wire. CUDA over
gloo (ranks sharing a GPU) - the wire buffer is pinned host memory and each slot has a twin on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist

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
    """One preallocated message: bytes on the wire, fields on the compute device, header words on the host."""

    def __init__(self, spec: MessageSpec, device: torch.device, gloo: bool) -> None:
        cuda = device.type == "cuda"
        self.staged = cuda and gloo
        self.on_device = cuda and not gloo  # NCCL: the wire buffer itself is on the device
        wire_device = torch.device("cpu") if gloo else device
        self.wire = torch.zeros(spec.nbytes, dtype=torch.uint8, device=wire_device, pin_memory=self.staged)
        self.local = torch.zeros_like(self.wire, device=device) if self.staged else self.wire
        self._spec = spec
        self._flat = spec.flat(self.local)
        self._views = spec.views(self.local)
        self.words = self.wire[: spec.header_bytes].view(torch.int64)
        self.host_words = (
            torch.zeros(len(self.words), dtype=torch.int64, pin_memory=True) if self.on_device else self.words
        )
        self.copied = torch.cuda.Event() if self.staged else None
        self.side = torch.cuda.Stream(device) if self.on_device else None

    @torch.no_grad()
    def pack(self, words: Sequence[int], rows: int, tensors: dict[str, torch.Tensor]) -> None:
        """Fill header and fields. Returns once a following isend reads the right bytes."""
        lengths = self._spec.lengths(tensors)
        for name, view in self._at(rows, tensors.keys(), lengths).items():
            view.copy_(tensors[name])
        if self.copied is not None:
            fields = slice(self._spec.header_bytes, None)
            self.wire[fields].copy_(self.local[fields], non_blocking=True)
            self.copied.record()
            self.copied.synchronize()  # gloo's thread reads host memory and knows no CUDA stream
        header = [*words, *[0] * (WORDS - len(words)), *lengths]
        self.host_words[: len(header)].copy_(torch.tensor(header))
        if self.on_device:
            self.words.copy_(self.host_words, non_blocking=True)  # isend waits for this stream: no host wait

    def finish(self, work: dist.Work) -> list[int]:
        """Block this (daemon) thread until the transfer is over; return the header words.

        NCCL: ``work.wait()`` only orders this thread's side stream after the transfer, so that stream is
        synchronised here; afterwards the main thread may use the buffer on any stream.
        """
        if self.side is None:
            work.wait(FOREVER)
        else:
            with torch.cuda.stream(self.side):
                work.wait()
                self.host_words.copy_(self.words, non_blocking=True)
                self.side.synchronize()
        return self.host_words.tolist()

    def unpack(self, rows: int) -> dict[str, torch.Tensor]:
        """Views of the first ``rows`` rows of the fields present, on the compute device's current stream."""
        present = int(self.host_words[3])
        if self.copied is not None:
            fields = slice(self._spec.header_bytes, None)
            self.local[fields].copy_(self.wire[fields], non_blocking=True)
            self.copied.record()
        names = {field.name for bit, field in enumerate(self._spec.fields) if present >> bit & 1}
        return self._at(rows, names, self.host_words[WORDS:].tolist())

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

    def before_reuse(self) -> None:
        """The next transfer may overwrite the wire buffer. NCCL: irecv waits for the current stream."""
        if self.copied is not None:
            self.copied.synchronize()
