"""Whole files or none, and no litter of killed processes: never at the cost of a living one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.store.atomic import remove_temporaries, temporary_of, write_atomically

WRITER = """
import sys, time
from pathlib import Path
from pipeline.store.atomic import write_atomically

def write(file):
    file.write(b"half of it")
    file.flush()
    print("half", flush=True)
    time.sleep(60)

write_atomically(Path(sys.argv[1]), write)
"""


@pytest.fixture
def writer(tmp_path: Path):
    """A process in the middle of writing model.pt."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "model.pt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        yield process
        process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_writes_stays(
    tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    half = f".model.pt.{writer.pid}.tmp"
    remove_temporaries(tmp_path)
    assert names(tmp_path) == [half, "notes.txt"]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


def test_a_writer_on_another_machine_keeps_its_file(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    """Its number says nothing here, its lock does."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / f".model.pt.{writer.pid}.tmp").rename(tmp_path / f".model.pt.{int(gone.stdout)}.tmp")
    remove_temporaries(tmp_path)
    assert names(tmp_path) == [f".model.pt.{int(gone.stdout)}.tmp"]


def test_a_process_takes_its_own_number_for_that_of_a_dead_one(tmp_path: Path) -> None:
    """In a container every run may have the same number."""
    temporary_of(tmp_path / "model.pt").write_text("left by the run before")
    remove_temporaries(tmp_path)
    assert names(tmp_path) == []


def test_only_files_of_the_asked_kind_are_looked_at(tmp_path: Path) -> None:
    for name in (f".a.pt.{os.getpid()}.tmp", f".b.txt.{os.getpid()}.tmp", ".c.pt.tmp", "d.pt.1.tmp"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path, lambda name: name.endswith(".pt"))
    assert names(tmp_path) == [f".b.txt.{os.getpid()}.tmp", ".c.pt.tmp", "d.pt.1.tmp"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail(file: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a", fail)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
