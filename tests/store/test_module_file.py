"""The file of a module is one for every reader of safetensors; one that lies about itself is refused by its name."""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.base.errors import CheckpointError
from pipeline.store.module_file import NAMES, check_state, read_state, write_state

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
MAP = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
STATE: dict[str, Tensor] = {
    **{f"z.{dtype}": torch.tensor([[0, 1, 2], [3, 0, 100]]).to(dtype) for dtype in DTYPES},
    **{f"scalar.{dtype}": torch.tensor(1).to(dtype) for dtype in DTYPES},
    "not a number": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    "empty": torch.zeros(0, 3),
    "channels_last": MAP.clone().to(memory_format=torch.channels_last),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "part": torch.arange(20.0)[3:9:2],
    "expanded": torch.ones(1, 4).expand(3, 4),
    "a name with \"quotes\", a \\ and an ä": torch.ones(1),
}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """To the bit."""
    def bits(value: Tensor) -> Tensor:
        return value.contiguous().reshape(-1).view(torch.uint8)

    def alike(one: Tensor, two: Tensor) -> bool:
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(bits(one), bits(two))

    return left.keys() == right.keys() and all(alike(left[name], value) for name, value in right.items())


def test_what_is_read_is_what_was_written_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "module-000.safetensors"
    write_state(path, STATE)
    found = read_state(path)
    assert same(found, STATE) and list(found) == list(STATE)
    assert all(value.is_contiguous() for value in found.values())
    assert all(value.data_ptr() % 64 == 0 for value in found.values() if value.numel())  # as torch lays tensors
    check_state(path)
    write_state(tmp_path / "none.safetensors", {})
    assert read_state(tmp_path / "none.safetensors") == {}


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    write_state(tmp_path / "ours", STATE)
    assert same(load_file(tmp_path / "ours"), STATE)
    plain = {name: value.contiguous() for name, value in STATE.items()}
    save_file(plain, tmp_path / "theirs", {NAMES: json.dumps(list(plain))})
    assert same(read_state(tmp_path / "theirs"), STATE)


def test_what_is_read_outlives_the_file(tmp_path: Path) -> None:
    """Old checkpoints are removed, while tensors of them may be at work."""
    path = tmp_path / "module-000.safetensors"
    write_state(path, {"weight": MAP})
    found = read_state(path)
    path.write_bytes(bytes(path.stat().st_size))
    os.truncate(path, 0)
    assert torch.equal(found["weight"], MAP)


def test_a_file_is_on_the_disk_for_all_who_may_read_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    for mode in (0o755, 0o700, 0o770):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        path = folder / "module-000.safetensors"
        write_state(path, {"weight": MAP})
        assert path.stat().st_mode & 0o777 == mode & 0o666
        assert path.stat().st_ino in synced
        assert [entry.name for entry in folder.iterdir()] == [path.name]


def test_what_cannot_be_written_is_an_error_of_the_system_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        write_state(tmp_path / "nowhere" / "module-000.safetensors", STATE)
    assert list(tmp_path.iterdir()) == []


def test_other_threads_go_on_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training does, while the saver writes; older versions of the library held the interpreter to the end."""
    count, counted, done = 0, 0, threading.Event()
    native = safetensors.torch.serialize_file

    def serialise(*arguments: Any, **options: Any) -> None:
        nonlocal counted
        before = count
        native(*arguments, **options)
        counted = count - before

    def save() -> None:
        try:
            write_state(tmp_path / "large", {"weight": torch.ones(2**23)})
        finally:
            done.set()

    monkeypatch.setattr(safetensors.torch, "serialize_file", serialise)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # s: no thread is made to give way
    try:
        saver = threading.Thread(target=save)
        saver.start()
        while not done.is_set():
            time.sleep(0)  # gives way
            count += 1
        saver.join()
    finally:
        sys.setswitchinterval(interval)
    assert counted > 0


# --- files that lie ---------------------------------------------------------------------------------------------------


def tensor(dtype: str = "F32", shape: tuple[int, ...] = (2,), begin: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def raw(header: bytes | dict[str, Any], content: bytes = bytes(8), length: int | None = None) -> bytes:
    """A file with a header; ``length``: what it says that is long, if not the truth."""
    if isinstance(header, dict):
        header = json.dumps({"__metadata__": {NAMES: json.dumps(list(header))}, **header}).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + content


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "header too small"),
        (raw({"a": tensor()}, length=2**62), "header too large"),
        (raw({"a": tensor()}, length=1000), "invalid header length"),
        (raw(b"\x80\x04cos\nsystem\n"), "header"),
        (raw(b"[1, 2]"), "invalid JSON in header"),
        (raw({"a": tensor(dtype="F99")}), "unknown variant `F99`"),
        (raw({"a": tensor(dtype="F64")}), "invalid shape, data type, or offset"),
        (raw({"a": tensor(shape=(3,))}), "invalid shape, data type, or offset"),
        (raw({"a": tensor(shape=(-2,))}), "invalid value: integer `-2`"),
        (raw({"a": tensor(shape=(2**62, 2**62))}), "overflow"),
        (raw({"a": tensor(), "b": tensor(begin=4, end=12)}, bytes(12)), "invalid offset for tensor `b`"),
        (raw({"a": tensor(begin=4, end=12)}, bytes(12)), "invalid offset for tensor `a`"),
        (raw({"a": tensor()}, bytes(7)), "file not fully covered"),
        (raw({"a": tensor()}, bytes(9)), "file not fully covered"),
        (raw(json.dumps({"a": tensor()}).encode()), "its list of names is not that of its tensors"),
        (raw({"__metadata__": {NAMES: '["a", "b"]'}, "a": tensor()}), "its list of names is not that of its tensors"),
        (raw({"__metadata__": {NAMES: '["a", ["a"]]'}, "a": tensor()}), "its list of names is not that of its tensors"),
        (raw({"__metadata__": {NAMES: "["}, "a": tensor()}), "Expecting value"),
    ],
)
def test_a_file_that_lies_about_itself_is_one_line_that_names_it(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "module-003.safetensors"
    path.write_bytes(content)
    for use in (check_state, read_state):
        with pytest.raises(CheckpointError) as caught:
            use(path)
        line = str(caught.value)
        assert f"'{tmp_path}': module-003.safetensors is no file of a module (" in line and why in line
        assert line.isprintable() and len(line) < 500 + len(str(tmp_path))


def test_a_dtype_that_torch_cannot_make_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "module-003.safetensors"
    path.write_bytes(raw({"a": tensor("F4", (2,), 0, 1)}, bytes(1)))
    with pytest.raises(CheckpointError, match="module-003.safetensors is no file of a module"):
        read_state(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for place in (tmp_path / "module-003.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=f"{place.name} is no file of a module"):
            read_state(place)
