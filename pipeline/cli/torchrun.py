"""``--nproc``: this process becomes torchrun, which starts the same command once per rank of this node.

    localpipe train --nproc 4 WORDS  ->  python -m torch.distributed.run --nproc_per_node=4 -m pipeline train WORDS

What torchrun takes beside that it reads from variables of its own: PET_NNODES, PET_RDZV_ENDPOINT, PET_MAX_RESTARTS, ...
Without torch, which takes seconds to import: a refusal comes at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import NoReturn

import pipeline

AUTO = "auto"
NODES = "PET_NNODES"
MEETING = ("PET_RDZV_ENDPOINT", "PET_RDZV_BACKEND", "PET_MASTER_ADDR")
"""How nodes find each other; where nothing says so, this node is alone, and its port is any free one."""
NVIDIA_SMI_S = 60.0
"""After which a driver that does not answer counts as broken."""


def become_torchrun(
    nproc: str, modules: int, words: list[str], replicas: int | str = 1, stages: int = 0
) -> NoReturn:
    """Replace this process; ``words``: what follows ``localpipe``; ``replicas``, ``stages``: keys of ``parallel``.

    Raises:
        ConfigError: ``nproc`` is neither a number of at least 1 nor ``auto``; torchrun has started this process itself.
    """
    started = os.environ.get("LOCAL_WORLD_SIZE")
    if started is not None:
        raise pipeline.ConfigError(f"--nproc {nproc}: torchrun has started {started} processes; leave --nproc out")
    processes = count_processes(nproc, modules, replicas, stages)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command(processes, words, os.environ))


def command(processes: int, words: list[str], environment: Mapping[str, str]) -> list[str]:
    """The command line of torchrun, as a module of this Python: the script ``torchrun`` may be that of a Python below a
    virtual environment, which does not see what is in that."""
    taken = argparse.ArgumentParser(add_help=False)  # torchrun has options that begin like this one
    taken.add_argument("--nproc")
    _, words = taken.parse_known_args(words)
    alone = environment.get(NODES, "1") == "1" and not any(environment.get(name) for name in MEETING)
    options = ["--standalone"] if alone else []
    options.append(f"--nproc_per_node={processes}")
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "pipeline", *words]


def count_processes(nproc: str, modules: int, replicas: int | str = 1, stages: int = 0) -> int:
    """Processes of this node. ``auto``: one per GPU that it sees, else one per CPU core, at most one per local module
    and replica (on all nodes together), so that all replicas have as many; with ``replicas`` = auto as many replicas of
    ``stages`` as there is room for."""
    if nproc != AUTO:
        if not nproc.isascii() or not nproc.isdigit() or int(nproc) < 1:
            raise pipeline.ConfigError(f"--nproc {nproc}: a number of processes (1, 2, ...) or {AUTO}")
        return int(nproc)
    most = os.environ.get(NODES, "1").rpartition(":")[2]  # of 2, or of 1:2
    nodes = int(most) if most.isdigit() and int(most) else 1  # else torchrun refuses it
    room = count_gpus() or count_cores()
    if isinstance(replicas, str):
        return max(1, room - room % stages)
    room = min(room, modules * replicas // nodes)
    return max(1, room - room % replicas if nodes == 1 else room)


def count_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def count_gpus() -> int:
    """GPUs that this process may use; 0 where no NVIDIA driver is.

    Raises:
        ConfigError: there is a driver, and it does not work. A job that then trains on the CPU wastes a night.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(1 for name in visible.split(",") if name.strip() not in ("", "-1"))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_S)
    except FileNotFoundError:
        return 0
    except (OSError, subprocess.TimeoutExpired) as error:
        raise pipeline.ConfigError(f"nvidia-smi -L: {error}; or give the number: --nproc N") from None
    if listed.returncode != 0:
        said = " ".join((listed.stdout + listed.stderr).split())
        raise pipeline.ConfigError(f"nvidia-smi -L exits {listed.returncode} ('{said}'); or give the number: --nproc N")
    return sum(1 for line in listed.stdout.splitlines() if line.startswith("GPU "))
