"""``localpipe train --nproc N|auto`` becomes torchrun: how many processes, which words. The driver is a script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_spawn import free_port

from pipeline import ConfigError
from pipeline.cli import torchrun

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
FOUR = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)\n  MIG 1g.10gb Device 0: (UUID: MIG-0)\n" + "".join(
    f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: GPU-{number})\n" for number in (1, 2, 3)
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher, no driver, eight cores."""
    for name in (*torchrun.MEETING, torchrun.NODES, "CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torchrun, "count_cores", lambda: 8)


def driver(folder: Path, prints: str, code: int = 0) -> None:
    """``nvidia-smi`` of a machine."""
    script = folder / "nvidia-smi"
    lines = ["import sys", "assert sys.argv[1:] == ['-L']", f"sys.stdout.write({prints!r})", f"sys.exit({code})"]
    script.write_text("\n".join([f"#!{sys.executable} -S", *lines]))
    script.chmod(0o755)


def test_auto_is_a_process_per_gpu_and_at_most_one_per_local_module(tmp_path: Path) -> None:
    driver(tmp_path, FOUR)
    assert [torchrun.count_processes("auto", modules) for modules in (1, 3, 4, 16)] == [1, 3, 4, 4]


def test_without_a_driver_auto_is_a_process_per_core() -> None:
    assert [torchrun.count_processes("auto", modules) for modules in (4, 16)] == [4, 8]


def test_auto_gives_all_replicas_as_many_processes() -> None:
    assert [torchrun.count_processes("auto", 2, replicas) for replicas in (2, 3, 4)] == [4, 6, 8]
    assert [torchrun.count_processes("auto", 16, replicas) for replicas in (3, 4, 5)] == [6, 8, 5]
    assert [torchrun.count_processes("auto", 16, "auto", stages) for stages in (2, 3, 4)] == [8, 6, 8]


@pytest.mark.parametrize(("visible", "count"), [("2,3", 2), ("GPU-1", 1), ("", 8), ("-1", 8)])
def test_gpus_that_are_hidden_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    driver(tmp_path, FOUR)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert torchrun.count_processes("auto", 16) == count  # none: the cores


@pytest.mark.parametrize(("nodes", "count"), [("1", 4), ("2", 3), ("1:2", 3), ("8", 1)])
def test_modules_are_shared_by_all_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: str, count: int
) -> None:
    driver(tmp_path, FOUR)
    monkeypatch.setenv(torchrun.NODES, nodes)
    assert torchrun.count_processes("auto", 6) == count


def test_a_driver_that_does_not_work_is_no_reason_to_train_on_the_cpu(tmp_path: Path) -> None:
    driver(tmp_path, "NVIDIA-SMI has failed\nbecause\n", code=9)
    with pytest.raises(ConfigError, match=r"nvidia-smi -L exits 9 \('NVIDIA-SMI has failed because'\); .*--nproc N"):
        torchrun.count_processes("auto", 4)
    assert torchrun.count_processes("2", 4) == 2


@pytest.mark.parametrize("nproc", ["0", "-1", "gpu", "2.0", ""])
def test_other_numbers_are_refused(nproc: str) -> None:
    with pytest.raises(ConfigError, match=f"--nproc {nproc}: a number of processes"):
        torchrun.count_processes(nproc, 4)


def test_torchrun_does_not_start_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun has started 2 processes"):
        torchrun.become_torchrun("2", 4, ["train"])


def test_one_node_is_alone_and_several_meet_where_the_environment_says() -> None:
    def options(environment: dict[str, str]) -> list[str]:
        words = ["train", "--set", "train.seed=1", "--nproc", "4", "--quiet"]
        command = torchrun.command(4, words, environment)
        assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
        assert command[-6:] == ["-m", "pipeline", "train", "--set", "train.seed=1", "--quiet"]
        return command[3:-6]

    assert options({}) == options({"PET_NNODES": "1"}) == ["--standalone", "--nproc_per_node=4"]
    assert options({"PET_NNODES": "2"}) == options({"PET_MASTER_ADDR": "node0"}) == ["--nproc_per_node=4"]


@pytest.mark.slow
def test_two_nodes_meet_by_what_the_environment_says(tmp_path: Path) -> None:
    """Two of them on this machine, a rank each."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PET_NNODES": "2"}
    environment |= {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "PET_RDZV_ID": "job"}
    environment |= {"PET_LOCAL_ADDR": "127.0.0.1"}
    settings = ["train.max_steps=2", "data.batch_size=16", "runtime.device=cpu"]
    settings += ["model.cuts=even", "patches.at_once=4", "partition.kind=count", "log.curve=false"]  # no counts
    words = [word for pair in settings for word in ("--set", pair)]
    start = [sys.executable, "-m", "pipeline", "train", "--nproc=1", "--run-dir", "run", *words]
    nodes = [
        subprocess.Popen(start, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "on 2 rank(s)" in "".join(outputs) and (tmp_path / "run" / "model.pt").is_file()


def test_what_cannot_work_is_said_before_torchrun_is_started(tmp_path: Path) -> None:
    """What can, test_entrypoint.py starts: two ranks on one node."""
    wrong = [sys.executable, "-m", "pipeline", "train", "--nproc=2", "--set", "method.name=xx"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(wrong, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("localpipe: method.name = 'xx'")
    assert done.stderr.count("\n") == 1
