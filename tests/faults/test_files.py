"""Disks that fill, checkpoints that are damaged or of another run: the good ones survive, by name."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import line_of, run_forked

from pipeline import read_metrics
from pipeline.store.checkpoint import open_checkpoint, step_folders

pytestmark = pytest.mark.long


def steps_of(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in step_folders(folder / "run" / "checkpoints")]


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    faults = [{"rank": 1, "step": 8, "do": "fill_disk"}, {"rank": 1, "step": 23, "do": "free_disk"}]
    results = run_forked(tmp_path, faults, settings={"checkpoint": {"keep": 99}})
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    assert results[0].value["weights_sha256"] == undisturbed["exact"]
    warnings = [line for line in results[0].stderr.splitlines() if line.startswith("localpipe warning:")]
    assert any("step 10 was not saved: rank 1: " in line and "older ones are untouched" in line for line in warnings)
    assert 5 in steps_of(tmp_path) and 10 not in steps_of(tmp_path) and 40 in steps_of(tmp_path)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    for path in step_folders(tmp_path / "run" / "checkpoints"):
        open_checkpoint(path)


def test_a_last_checkpoint_that_fails_fails_the_job(tmp_path: Path) -> None:
    results = run_forked(tmp_path, [{"rank": 1, "step": 8, "do": "fill_disk"}])
    assert all(result.exit_code != 0 for result in results)
    line = line_of(results)
    assert "the run is complete, but its last checkpoint was not saved: rank 1" in line
    assert (tmp_path / "run" / "summary.json").exists() and steps_of(tmp_path) == [5]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_file_system_without_space_keeps_what_it_has(small_disk: Path) -> None:
    results = run_forked(small_disk, [], settings={"checkpoint": {"keep": 99}})
    assert all(result.exit_code != 0 for result in results)
    assert "No space left on device" in "".join(result.stderr for result in results)
    kept = step_folders(small_disk / "run" / "checkpoints")
    assert kept
    for path in kept:
        open_checkpoint(path)


@pytest.mark.usefixtures("small_disk")  # without root it skips
def test_a_directory_that_becomes_read_only_keeps_what_it_has(tmp_path: Path) -> None:
    """Training goes on to its end without saving; that its last checkpoint is missing fails the job."""
    try:
        results = run_forked(tmp_path, [{"rank": 1, "step": 12, "do": "make_read_only"}])
        assert all(result.exit_code != 0 for result in results)
        assert "the run is complete" in line_of(results) and "Read-only file system" in line_of(results)
        assert "localpipe warning: the checkpoint of step 20 was not saved" in results[0].stderr
        assert steps_of(tmp_path)
        for path in step_folders(tmp_path / "run" / "checkpoints"):
            open_checkpoint(path)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "run" / "checkpoints")], check=True)


@pytest.mark.parametrize("how", ["rename_run", "delete_run"])
def test_a_run_goes_on_in_a_whole_directory_when_its_own_is_gone(
    tmp_path: Path, undisturbed: dict[str, str], how: str
) -> None:
    """In the second of two epochs, so that saves and metrics follow; and it may be resumed like any other."""
    again = [{"rank": 0, "step": 31, "do": how}] if how == "delete_run" else []  # which is not said once more
    results = run_forked(tmp_path, [{"rank": 0, "step": 23, "do": how}, *again], settings={"checkpoint": {"keep": 99}})
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    assert results[0].value["weights_sha256"] == undisturbed["exact"]
    told = [line for result in results for line in result.stderr.splitlines() if "deleted or renamed;" in line]
    assert len(told) == 1 and told[0].startswith("localpipe warning: run directory '"), told
    there = {path.name for path in (tmp_path / "run").iterdir()}
    files = {"config.toml", "plan.json", "metrics.jsonl", "summary.json", "model.pt", "heads.pt", ".lock"}
    assert there == {*files, "checkpoints"}
    assert [epoch["epoch"] for epoch in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert steps_of(tmp_path)[0] == 40 and 20 not in steps_of(tmp_path)
    for path in step_folders(tmp_path / "run" / "checkpoints"):
        open_checkpoint(path)
    if how == "rename_run":
        moved = tmp_path / "moved"
        assert not (moved / "summary.json").exists() and open_checkpoint(moved).step <= 20


def test_a_run_whose_directory_another_job_has_taken_stops(tmp_path: Path) -> None:
    results = run_forked(tmp_path, [{"rank": 0, "step": 23, "do": "replace_run"}])
    assert all(result.exit_code != 0 for result in results)
    assert "was renamed, and another job has begun in its place" in line_of(results)
    assert not (tmp_path / "run" / "config.toml").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    results = run_forked(tmp_path, [], ranks=2)
    assert all(result.exit_code != 0 for result in results)
    assert "cannot be written" in line_of(results) and "--run-dir" in line_of(results)


def damage(folder: Path, how: str) -> None:
    newest = step_folders(folder / "run" / "checkpoints")[0]
    data = newest / "module-001.safetensors"
    content = bytearray(data.read_bytes())
    if how == "missing file":
        data.unlink()
    elif how == "truncated":
        data.write_bytes(content[: len(content) // 2])
    elif how == "flipped bit":
        content[len(content) // 2] ^= 4
        data.write_bytes(content)
    else:
        manifest = newest / "manifest.json"
        manifest.write_text('{"format": 99, "files": {}}' if how == "newer format" else '{"some": "thing"}')


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that was killed shortly before its end."""
    folder = tmp_path_factory.mktemp("killed")
    faults = [{"rank": 1, "step": 33, "do": "kill"}]
    run_forked(folder, faults, ranks=2, settings={"checkpoint": {"keep": 99}}, pause_s=0.003)
    return folder


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("missing file", "module-001.safetensors cannot be read"),
        ("truncated", "(cut short?)"),
        ("flipped bit", "module-001.safetensors has changed since it was written"),
        ("newer format", "has format 99"),
        ("foreign", "manifest.json is none of localpipe's"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_or_refused_by_name(
    tmp_path: Path, killed: Path, undisturbed: dict[str, str], how: str, why: str
) -> None:
    shutil.copytree(killed / "run", tmp_path / "run")
    newest = step_folders(tmp_path / "run" / "checkpoints")[0]
    damage(tmp_path, how)

    other = tmp_path / "other"
    refused = run_forked(other, [], ranks=2, resume=str(newest))
    assert all(result.exit_code != 0 for result in refused)
    assert newest.name in line_of(refused) and why in line_of(refused)

    results = run_forked(tmp_path, [], ranks=2)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    warnings = [line for line in results[0].stderr.splitlines() if line.startswith("localpipe warning:")]
    assert any(newest.name in line and why in line for line in warnings), warnings
    assert results[0].value["weights_sha256"] == undisturbed["exact"]


def test_a_changed_configuration_is_refused_by_its_key_or_goes_on(
    tmp_path: Path, killed: Path, undisturbed: dict[str, str]
) -> None:
    """What is said of it: test_resume.py."""
    shutil.copytree(killed / "run", tmp_path / "run")
    refused = run_forked(tmp_path, [], ranks=2, settings={"data": {"batch_size": 4}, "train": {"seed": 5}})
    assert "train.seed (0 there, 5 now)" in line_of(refused)
    results = run_forked(tmp_path, [], ranks=2, settings={"optim": {"lr": 0.01}})
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    assert results[0].value["steps"] == 40 and results[0].value["weights_sha256"] != undisturbed["exact"]
