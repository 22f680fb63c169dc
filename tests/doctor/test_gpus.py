"""What the doctor makes of a driver's answers. They are samples (samples.py): there is no GPU here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from samples import CROSSED, NVSWITCH, QUERY_H100, QUERY_SHARED, TWO_SOCKETS

from pipeline.doctor.finding import Finding, Level
from pipeline.doctor.gpus import best_order, gpu_findings, judge_links, parse_gpus, parse_topology, visible

ARCH = ["sm_80", "sm_90"]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No driver, no GPU hidden."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def driver(folder: Path, query: str, topology: str, code: int = 0) -> None:
    """``nvidia-smi`` of a machine."""
    script = folder / "nvidia-smi"
    answer = f"sys.stdout.write({topology!r} if sys.argv[1] == 'topo' else {query!r})"
    script.write_text("\n".join([f"#!{sys.executable} -S", "import sys", answer, f"sys.exit({code})"]))
    script.chmod(0o755)


def look(ranks: int = 4, request: str = "auto", cuda: str | None = "13.0", seen: int = 4) -> tuple[Finding, Finding]:
    gpus, links = gpu_findings(ranks, request, cuda, seen, ARCH)
    return gpus, links


def test_a_table_of_links_is_read_with_its_adapters_and_colours() -> None:
    links = parse_topology(NVSWITCH)
    assert links[0, 0] == "X" and links[0, 1] == links[7, 6] == "NV18"
    assert set(links) == {(a, b) for a in range(8) for b in range(8)}


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table of links"):
        parse_topology("Failed to initialize NVML: Driver/library version mismatch\n")


def test_nvlink_between_all_neighbours_is_fine() -> None:
    found = judge_links(list(range(8)), parse_topology(NVSWITCH))
    assert (found.level, found.text) == (Level.OK, "NVLink between all neighbours (NV18)")


def test_one_hop_between_sockets_cannot_be_avoided() -> None:
    found = judge_links([0, 1, 2, 3], parse_topology(TWO_SOCKETS))
    assert found.level is Level.NOTE and found.text.startswith("SYS between GPU 1 - GPU 2: ")


def test_a_better_order_of_the_gpus_is_the_fix() -> None:
    links = parse_topology(CROSSED)
    assert best_order([0, 1, 2, 3], links) == [0, 2, 1, 3]
    found = judge_links([0, 1, 2, 3], links)
    assert found.level is Level.WARNING and found.fix == "set CUDA_VISIBLE_DEVICES=0,2,1,3"
    assert judge_links([0, 2, 1, 3], links).level is Level.NOTE  # as told


def test_hidden_gpus_are_not_neighbours() -> None:
    gpus = parse_gpus(QUERY_H100)
    assert [gpu.index for gpu in visible(gpus, "3,GPU-1110")] == [3, 1]
    assert [gpu.index for gpu in visible(gpus, "1,9,2")] == [1]  # as CUDA reads it
    assert visible(gpus, "") == [] and visible(gpus, None) == gpus


def test_without_a_driver_only_a_job_that_wants_gpus_is_unfit() -> None:
    gpus, links = look()
    assert gpus.level is Level.NOTE and "no NVIDIA driver" in gpus.text and links.level is Level.OK
    gpus, _ = look(request="cuda")
    assert gpus.level is Level.ERROR and "runtime.device=cpu" in gpus.fix


def test_a_driver_that_does_not_work_is_an_error(tmp_path: Path) -> None:
    driver(tmp_path, "Failed to initialize\nNVML\n", "", code=9)
    gpus, links = look()
    assert gpus.level is Level.ERROR and "nvidia-smi exits 9 ('Failed to initialize NVML')" in gpus.text
    assert links.text == "none between GPUs (no answer of the driver)"


def test_gpus_at_work_for_somebody_else_are_named(tmp_path: Path) -> None:
    driver(tmp_path, QUERY_H100, CROSSED)
    gpus, links = look()
    assert gpus.level is Level.WARNING and "30.5 GiB of GPU 2" in gpus.text
    assert gpus.text.startswith("4 x NVIDIA H100 80GB HBM3, 79.6 GiB each, driver 580.65.06")
    assert links.level is Level.WARNING


def test_idle_gpus_are_fine_and_links_are_those_of_the_visible_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(tmp_path, QUERY_H100, CROSSED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    gpus, links = look(ranks=2, seen=2)
    assert gpus.level is Level.OK and "2 more hidden by CUDA_VISIBLE_DEVICES" in gpus.text
    assert (links.level, links.text) == (Level.OK, "NVLink between all neighbours (NV4)")


def test_gpus_that_are_not_to_be_used_are_a_note_at_most(tmp_path: Path) -> None:
    driver(tmp_path, "Failed to initialize NVML", "", code=9)
    gpus, _ = look(request="cpu")
    assert gpus.level is Level.NOTE and gpus.text.endswith("(not used)")
    driver(tmp_path, QUERY_H100, CROSSED)
    assert [finding.level for finding in look(request="cpu")] == [Level.NOTE, Level.NOTE]


@pytest.mark.parametrize(
    ("arguments", "level", "words"),
    [
        ({"cuda": None}, Level.ERROR, "this torch has no CUDA"),
        ({"seen": 0}, Level.ERROR, "torch (CUDA 13.0) can use 0 of them"),
        ({"ranks": 5}, Level.WARNING, "5 ranks need one each, so they take the CPU"),
        ({"ranks": 5, "request": "cuda"}, Level.ERROR, "so they do not start"),
    ],
)
def test_what_torch_cannot_use_is_said(
    arguments: dict[str, object], level: Level, words: str, tmp_path: Path
) -> None:
    driver(tmp_path, QUERY_H100, CROSSED)
    gpus, _ = look(**arguments)  # type: ignore[arg-type]
    assert gpus.level is level and words in gpus.text and gpus.fix


def test_a_gpu_that_torch_was_not_compiled_for_is_an_error(tmp_path: Path) -> None:
    driver(tmp_path, QUERY_SHARED, "")
    gpus, links = look(ranks=1, seen=1)
    assert gpus.level is Level.ERROR and "compute capability 12.1, torch is for sm_80, sm_90" in gpus.text
    assert links.text == "none between GPUs (1 GPU)"
    newer, _ = gpu_findings(1, "auto", "13.0", 1, ["sm_90", "sm_120"])
    assert newer.level is Level.OK  # of its generation
