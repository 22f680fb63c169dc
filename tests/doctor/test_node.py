"""What a node has: limits that are set for a process of its own, files that stand for a system's, a real tmpfs."""

from __future__ import annotations

import dataclasses
import os
import resource
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import free_port, run_ranks

from pipeline.doctor import network, node
from pipeline.doctor.finding import Finding, Level
from pipeline.doctor.limits import UNLIMITED, Cgroup, Roots, available_memory
from pipeline.doctor.node import GIB, Job, cores, disk, examine, limits, memory, shared_memory, software

MIB = 1 << 20
NO_LIMITS = Cgroup()


def job(tmp_path: Path, **changes: Any) -> Job:
    """Two ranks of one node, on CPUs."""
    roots = Roots(tmp_path / "proc", tmp_path / "sys", tmp_path / "shm")
    plain = Job(here=2, size=2, nodes=1, request="cpu", threads=0, batch_bytes=4 * MIB, run_dir=tmp_path, roots=roots)
    return dataclasses.replace(plain, **changes)


def files(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_a_healthy_node_has_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    found = list(examine(job(tmp_path, here=1, size=1, roots=Roots())))
    subjects = ["software", "NCCL", "GPUs", "links", "cores", "memory", "shared memory", "limits", "network", "disk"]
    assert [finding.subject for finding in found] == subjects
    assert f"torch {torch.__version__}" in software().text
    assert all(finding.level is not Level.ERROR for finding in found), found


# -- limits of the process -------------------------------------------------------------------------------------------


def with_few_files(rank: int, folder: str) -> Finding:
    """In a process of its own: a limit that has been lowered stays so."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    return limits(job(Path(folder), size=16), NO_LIMITS, has_gpus=False)


def test_a_limit_of_open_files_that_a_rank_would_exceed_is_an_error(tmp_path: Path) -> None:
    (done,) = run_ranks(with_few_files, 1, str(tmp_path))
    assert done.exit_code == 0, done.stderr
    assert done.value.level is Level.ERROR and "open files 100" in done.value.text
    assert done.value.fix.startswith("ulimit -n 4096")


def test_a_limit_of_processes_counts_threads(tmp_path: Path) -> None:
    found = limits(job(tmp_path), Cgroup(processes=100), has_gpus=False)
    assert found.level is Level.ERROR and "2 ranks begin up to 128 threads" in found.text
    assert "--pids-limit" in found.fix
    assert limits(job(tmp_path), Cgroup(processes=200), has_gpus=False).level is Level.OK


def test_locked_memory_matters_where_there_is_infiniband(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "soft_limit", lambda kind: 8.0 * MIB if kind == resource.RLIMIT_MEMLOCK else UNLIMITED)
    found = limits(job(tmp_path), NO_LIMITS, has_gpus=True)
    assert found.level is Level.OK and "open files unlimited" in found.text
    files(tmp_path, {"sys/class/infiniband/mlx5_0/node_guid": ""})
    found = limits(job(tmp_path), NO_LIMITS, has_gpus=True)
    assert found.level is Level.WARNING and "locked memory 8.0 MiB" in found.text and "ulimit -l" in found.fix


# -- limits of control groups ----------------------------------------------------------------------------------------


def test_the_lowest_limit_up_to_the_root_counts_in_version_2(tmp_path: Path) -> None:
    files(tmp_path, {"proc/self/cgroup": "0::/pod/job\n", "proc/meminfo": "MemAvailable: 8388608 kB\n"})
    group = {"memory.max": "max", "memory.current": "1", "cpu.max": "max 100000", "pids.max": "70", "pids.current": "5"}
    files(tmp_path / "sys/fs/cgroup/pod/job", group)
    above = {"memory.max": str(4 * GIB), "memory.current": str(GIB), "cpu.max": "150000 100000", "pids.max": "max"}
    files(tmp_path / "sys/fs/cgroup/pod", above)
    roots = job(tmp_path).roots
    found = Cgroup.read(roots)
    assert found == Cgroup(memory_bytes=4 * GIB, memory_used_bytes=GIB, cores=1.5, processes=65)
    assert available_memory(roots, found) == 3 * GIB
    assert available_memory(roots, NO_LIMITS) == 8 * GIB


def test_version_1_has_a_tree_for_each_kind(tmp_path: Path) -> None:
    files(tmp_path, {"proc/self/cgroup": "4:memory:/docker/1f\n3:cpu,cpuacct:/docker/1f\n2:pids:/\n0::/\n"})
    top = tmp_path / "sys/fs/cgroup"
    files(top / "memory", {"docker/1f/memory.limit_in_bytes": str(2 * GIB), "docker/1f/memory.usage_in_bytes": "0"})
    files(top / "memory", {"memory.limit_in_bytes": "9223372036854771712"})
    files(top / "cpu,cpuacct/docker/1f", {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"})
    files(top / "pids", {"pids.max": "max"})
    assert Cgroup.read(job(tmp_path).roots) == Cgroup(memory_bytes=2 * GIB, cores=0.5)


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert Cgroup.read(job(tmp_path).roots) == NO_LIMITS


def test_more_ranks_than_cores_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "cores_in_use", lambda cgroup: min(8.0, cgroup.cores))
    monkeypatch.setattr(node, "usable_cores", lambda: 8)
    assert cores(job(tmp_path, here=8), NO_LIMITS, on_cpu=True).level is Level.OK
    found = cores(job(tmp_path, here=9), NO_LIMITS, on_cpu=True)
    assert found.level is Level.WARNING and "9 ranks take turns on them" in found.text and "start 8 ranks" in found.fix
    assert cores(job(tmp_path, here=4, threads=3), NO_LIMITS, on_cpu=True).fix.startswith("start 2 ranks here")
    assert cores(job(tmp_path, here=4, threads=3), NO_LIMITS, on_cpu=False).level is Level.OK


def test_a_quota_that_threads_do_not_know_of_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "cores_in_use", lambda cgroup: min(8.0, cgroup.cores))
    monkeypatch.setattr(node, "usable_cores", lambda: 8)
    found = cores(job(tmp_path), Cgroup(cores=4.0), on_cpu=True)
    assert found.level is Level.WARNING and found.fix == "--set runtime.threads=2"
    assert cores(job(tmp_path, threads=2), Cgroup(cores=4.0), on_cpu=True).level is Level.OK


def test_too_little_memory_for_the_ranks_is_a_warning(tmp_path: Path) -> None:
    files(tmp_path, {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {3 * GIB // 2048} kB\n"})
    found = memory(job(tmp_path), NO_LIMITS)
    assert found.level is Level.WARNING and "1.5 GiB free" in found.text and "2 ranks need 2.0 GiB" in found.text
    assert memory(job(tmp_path, here=1), NO_LIMITS).level is Level.OK


# -- shared memory, disk ---------------------------------------------------------------------------------------------


def test_a_small_shared_memory_is_held_against_what_loaders_and_nccl_keep_there(tmp_path: Path) -> None:
    place = tmp_path / "shm"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", place]).returncode:
        pytest.skip("a tmpfs needs root and the right to mount")
    try:
        assert shared_memory(job(tmp_path), has_gpus=False, workers=2).level is Level.OK
        found = shared_memory(job(tmp_path), has_gpus=False, workers=3)
        assert found.level is Level.WARNING and "16.0 MiB free of 16.0 MiB" in found.text
        assert "a loader with 3 workers 24.0 MiB" in found.text and "--shm-size 1g" in found.fix
        assert shared_memory(job(tmp_path), has_gpus=True, workers=0).level is Level.ERROR
    finally:
        subprocess.run(["umount", place], check=True)


def test_where_there_is_no_such_place_nothing_is_missing(tmp_path: Path) -> None:
    assert shared_memory(job(tmp_path), has_gpus=False, workers=3).level is Level.OK


def test_the_place_of_results_need_not_exist_yet_but_must_be_a_directory(tmp_path: Path) -> None:
    assert disk(tmp_path / "runs" / "mine").text.endswith(f"free at {tmp_path}")
    (tmp_path / "file").touch()
    found = disk(tmp_path / "file" / "runs")
    assert found.level is Level.ERROR and "--run-dir" in found.fix


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "FREE_DISK_BYTES", UNLIMITED)
    assert disk(tmp_path).level is Level.WARNING


# -- network ---------------------------------------------------------------------------------------------------------


def called(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """The address that the name of this machine stands for."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *name, type: found)


def test_a_port_that_is_taken_is_an_error_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert network.port_finding(serves=False) == Finding(
            "port", Level.ERROR, f"MASTER_PORT = {port} is taken", "end the other job, or set another port"
        )
        assert network.port_finding(serves=True).level is Level.OK  # the launcher's own
        monkeypatch.delenv("MASTER_PORT")
        monkeypatch.setattr(network, "PORT", port)
        assert network.port_finding(serves=False).level is Level.NOTE
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert network.port_finding(serves=False).level is Level.OK


def test_a_store_at_an_address_of_every_machine_matters_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert network.port_finding(serves=True, nodes=1).level is Level.OK
    found = network.port_finding(serves=True, nodes=2)
    assert found.level is Level.WARNING and "localhost" in found.text and "--local-addr" in found.fix
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # two nodes on one machine
    assert network.port_finding(serves=True, nodes=2).level is Level.OK


def test_a_name_that_other_machines_cannot_reach_matters_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    called(monkeypatch, "127.0.1.1")
    port, roots = Finding("port", Level.OK, "1 is free"), job(tmp_path).roots
    (alone,) = network.network_findings(roots, 1, port)
    assert alone.level is Level.OK and alone.text.endswith("; port 1 is free")
    called(monkeypatch, "fd00::1")
    assert network.network_findings(roots, 2, port)[0].level is Level.OK
    called(monkeypatch, "::1")
    found, kept = network.network_findings(roots, 2, port)
    assert found.level is Level.ERROR and "GLOO_SOCKET_IFNAME" in found.fix and kept is port


def test_a_slow_interface_matters_between_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "eth1")])
    called(monkeypatch, "10.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    files(tmp_path / "sys/class/net", {"eth0/speed": "1000\n", "eth1/speed": "25000\n"})
    port, roots = Finding("port", Level.OK, "1 is free"), job(tmp_path).roots
    assert network.network_findings(roots, 1, port)[0].level is Level.OK
    found = network.network_findings(roots, 2, port)[0]
    assert found.level is Level.WARNING and "(1 Gbit/s)" in found.text and found.fix == "set GLOO_SOCKET_IFNAME=eth1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eht0")
    found = network.network_findings(roots, 1, port)[0]
    assert found.level is Level.ERROR and "eht0" in found.text and "eth0" in found.fix


def test_a_name_server_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    read, write = os.pipe()
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *name, type: os.read(read, 1))
    monkeypatch.setattr(network, "SLOW_NAMES_S", 0.05)
    found = network.network_findings(job(tmp_path).roots, 1, Finding("port", Level.OK, ""))[0]
    os.write(write, b".")
    os.close(write)
    assert found.level is Level.WARNING and "RES_OPTIONS" in found.fix


def test_variables_that_slow_nccl_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_nccl_version", lambda: "2.30.7")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    found = node.nccl(has_gpus=True)
    assert found.level is Level.WARNING and found.fix == "unset NCCL_P2P_DISABLE"
    assert node.nccl(has_gpus=False).level is Level.OK
    monkeypatch.setattr(node, "_nccl_version", lambda: "")
    assert node.nccl(has_gpus=True).level is Level.ERROR
