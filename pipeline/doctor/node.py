"""What one node has, in ten lines: nothing here needs another rank, and nothing makes a CUDA context."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.base.version import code_version
from pipeline.doctor.finding import Finding, Level, size
from pipeline.doctor.gpus import gpu_findings
from pipeline.doctor.limits import (
    UNLIMITED,
    Cgroup,
    Roots,
    available_memory,
    cores_in_use,
    soft_limit,
)
from pipeline.doctor.network import network_findings, port_finding
from pipeline.ranks.resources import usable_cores

GIB = 1 << 30
NCCL_SHARED_BYTES = GIB
"""NCCL's own advice for containers, whose default of 64 MiB is too little (its troubleshooting: ``--shm-size=1g``)."""
LOADER_BATCHES = 2
"""Batches that each worker of a DataLoader keeps in shared memory: torch's ``prefetch_factor``."""
RANK_BYTES = GIB
"""Host memory of a rank before its model and data: torch and its libraries, with CUDA more than without."""
FILES, FILES_PER_RANK = 128, 4
"""Files and sockets that a rank has open, and how many more per rank of the job. Four ranks had 57 at most."""
THREADS = 64
"""Threads of a rank, loaders not counted. Four ranks on two cores had 33 at most."""
FREE_DISK_BYTES = GIB
VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "CUDA_DEVICE_MAX_CONNECTIONS")
SLOWING = {
    "NCCL_P2P_DISABLE": "GPUs do not reach each other directly",
    "NCCL_SHM_DISABLE": "GPUs without a direct link use the network",
    "NCCL_IB_DISABLE": "machines use sockets and not InfiniBand",
    "CUDA_DEVICE_MAX_CONNECTIONS": "a receive that waits can hold up computing",
}
"""Variables that, set to 1, make training slow, and why."""


@dataclass(frozen=True)
class Job:
    """What is to run.

    Attributes:
        here: ranks of this node. size: of all nodes. nodes: how many.
        request: ``runtime.device``. threads: ``runtime.threads``.
        batch_bytes: of one batch of images as floats.
        run_dir: where the results are to go.
        serves: whether a launcher serves the store.
        first: whether this node has rank 0.
    """

    here: int
    size: int
    nodes: int
    request: str
    threads: int
    batch_bytes: int
    run_dir: Path
    serves: bool = False
    first: bool = True
    roots: Roots = field(default_factory=Roots)


def examine(job: Job) -> Iterator[Finding]:
    """The findings about this node, as they come."""
    cgroup = Cgroup.read(job.roots)
    gpus, links = gpu_findings(
        job.here, job.request, torch.version.cuda, torch.cuda.device_count(), torch.cuda.get_arch_list()
    )
    has_gpus = torch.cuda.device_count() > 0 and job.request != "cpu"
    yield software()
    yield nccl(has_gpus)
    yield gpus
    yield links
    yield cores(job, cgroup, on_cpu=not has_gpus or (job.request == "auto" and job.here > torch.cuda.device_count()))
    yield memory(job, cgroup)
    yield shared_memory(job, has_gpus, int(cores_in_use(cgroup)))
    yield limits(job, cgroup, has_gpus)
    theirs = Finding("port", Level.OK, "is for the first node to open")
    port = port_finding(job.serves, job.nodes) if job.first else theirs
    yield from network_findings(job.roots, job.nodes, port)
    yield disk(job.run_dir)


def versions() -> dict[str, str]:
    """What the ranks of a job should have in common, by name."""
    return {
        "localpipe": code_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "NCCL": _nccl_version() or "none",
        "Python": platform.python_version(),
    }


def software() -> Finding:
    """One line: versions."""
    listed = [f"{name} {version}" for name, version in versions().items() if name != "NCCL"]
    return Finding("software", Level.OK, ", ".join(listed))


def _nccl_version() -> str:
    if not (torch.version.cuda and dist.is_nccl_available()):
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))


def nccl(has_gpus: bool) -> Finding:
    """One line: NCCL, and the variables that change what it or gloo does."""
    version = _nccl_version()
    text = f"{version}{'' if has_gpus else ', not used without GPUs: ranks talk through gloo'}"
    if not version:
        level = Level.ERROR if has_gpus else Level.OK
        fix = "install a torch that has it" if has_gpus else ""
        return Finding("NCCL", level, "this torch has none; ranks talk through gloo", fix)
    names = [name for name in sorted(os.environ) if name.startswith(VARIABLES if has_gpus else "GLOO_")]
    text += "".join(f", {name}={os.environ[name]}" for name in names)
    slow = [name for name in SLOWING if os.environ.get(name) == "1"]
    if has_gpus and slow:
        why = "; ".join(f"{name}: {SLOWING[name]}" for name in slow)
        return Finding("NCCL", Level.WARNING, f"{text}; {why}", f"unset {' '.join(slow)}")
    return Finding("NCCL", Level.OK, text)


def cores(job: Job, cgroup: Cgroup, on_cpu: bool) -> Finding:
    """One line: cores against ranks. ``on_cpu``: whether ranks compute there."""
    usable = cores_in_use(cgroup)
    nodes = len(list((job.roots.sys / "devices/system/node").glob("node[0-9]*")))
    text = f"{usable:g} usable of {os.cpu_count()}"
    text += f" (quota of the control group: {cgroup.cores:g})" if cgroup.cores < UNLIMITED else ""
    text += f", {nodes} NUMA node{'s' if nodes > 1 else ''}" if nodes else ""
    threads = max(job.threads, 1)
    if job.here * threads > usable and (on_cpu or job.here > usable):
        what = f"{job.here} rank{'s' if job.here > 1 else ''}" + (f" of {threads} threads" if threads > 1 else "")
        most = int(usable // threads)
        fix = f"start {most} rank{'s' if most > 1 else ''} here" if most >= 1 else "--set runtime.threads=1"
        return Finding("cores", Level.WARNING, f"{text}; {what} take turns on them", f"{fix}, or take more cores")
    counted = max(1, usable_cores() // job.here)  # what runtime.threads = 0 gives each rank
    if on_cpu and job.threads == 0 and counted * job.here > max(usable, job.here):
        fix = f"--set runtime.threads={max(1, int(usable // job.here))}"
        return Finding("cores", Level.WARNING, f"{text}; threads are counted without the quota", fix)
    return Finding("cores", Level.OK, text)


def memory(job: Job, cgroup: Cgroup) -> Finding:
    """One line: free host memory against ranks."""
    free = available_memory(job.roots, cgroup)
    if free == UNLIMITED:
        return Finding("memory", Level.OK, "the system does not say how much is free")
    text = f"{size(free)} free"
    text += f" (limit of the control group: {size(cgroup.memory_bytes)})" if cgroup.memory_bytes < UNLIMITED else ""
    if free < job.here * RANK_BYTES:
        text += f"; {job.here} ranks need {size(job.here * RANK_BYTES)} before their models and data"
        return Finding("memory", Level.WARNING, text, "start fewer ranks here, or raise the limit")
    return Finding("memory", Level.OK, text)


def shared_memory(job: Job, has_gpus: bool, workers: int) -> Finding:
    """One line: /dev/shm against what NCCL, and loaders with ``workers`` processes, keep there. The queues of edges are
    not there: gloo has sockets, and NCCL's buffers are those counted."""
    path = job.roots.shared_memory
    try:
        found = shutil.disk_usage(path)
    except OSError:
        return Finding("shared memory", Level.OK, f"there is no {path}: this system keeps it elsewhere")
    needs = {"NCCL": NCCL_SHARED_BYTES} if has_gpus else {}
    if workers:
        needs[f"a loader with {workers} workers"] = workers * LOADER_BATCHES * job.batch_bytes
    text = f"{size(found.free)} free of {size(found.total)} in {path}"
    total = sum(needs.values())
    if found.free < total:
        listed = ", ".join(f"{name} {size(need)}" for name, need in needs.items())
        enough = f"{-(-total // GIB)}g"
        fix = f"docker run --ipc host, or --shm-size {enough}; mount -o remount,size={enough} {path}"
        level = Level.ERROR if has_gpus and found.free < NCCL_SHARED_BYTES / 8 else Level.WARNING
        return Finding("shared memory", level, f"{text}; needed: {listed}", fix)
    return Finding("shared memory", Level.OK, f"{text}; {size(total)} needed")


def limits(job: Job, cgroup: Cgroup, has_gpus: bool) -> Finding:
    """One line: open files, processes, locked memory."""
    files, processes, locked = map(soft_limit, (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK))
    need, threads = FILES + FILES_PER_RANK * job.size, THREADS * job.here
    text = f"open files {_limit(files)}, processes {_limit(processes)}, locked memory "
    text += size(locked) if locked < UNLIMITED else "unlimited"
    if cgroup.processes < UNLIMITED:
        text += f", control group {cgroup.processes:g} more processes"
    if files < need:
        fix = f"ulimit -n {max(4096, need)}; docker run --ulimit nofile={max(4096, need)}"
        return Finding("limits", Level.ERROR, f"{text}; a rank of {job.size} opens up to {need} files", fix)
    if min(processes if os.geteuid() else UNLIMITED, cgroup.processes) < threads:
        what = f"{job.here} ranks begin up to {threads} threads, which count as processes"
        fix = f"ulimit -u unlimited; docker run --pids-limit {2 * threads}"
        return Finding("limits", Level.ERROR, f"{text}; {what}", fix)
    if has_gpus and locked < UNLIMITED and any((job.roots.sys / "class/infiniband").glob("*")):
        fix = "ulimit -l unlimited; docker run --ulimit memlock=-1"
        return Finding("limits", Level.WARNING, f"{text}; InfiniBand locks the buffers of NCCL", fix)
    return Finding("limits", Level.OK, text)


def _limit(value: float) -> str:
    return "unlimited" if value == UNLIMITED else f"{value:.0f}"


def disk(run_dir: Path) -> Finding:
    """One line: the place of the results."""
    place = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding("disk", Level.ERROR, f"{place} cannot be written", "choose another place: --run-dir")
    stats = os.statvfs(place)
    free = stats.f_bavail * stats.f_frsize
    text = f"{size(free)} free at {place}"
    if free < FREE_DISK_BYTES or (stats.f_files and not stats.f_favail):
        text += "" if stats.f_favail else ", no more files"
        return Finding("disk", Level.WARNING, text, "make room for checkpoints, or choose another place: --run-dir")
    return Finding("disk", Level.OK, text)
