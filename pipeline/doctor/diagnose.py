"""The whole diagnosis: of this node first, since it may explain why the ranks do not find each other.

    examine this node (local rank 0)  ->  the ranks meet  ->  versions  ->  clocks  ->  pairs of neighbours
    rank 0 tells its node's lines         it tells those of other nodes, and about all ranks
"""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.base.config import Config
from pipeline.base.validation import validate
from pipeline.data import CATALOGUE
from pipeline.doctor.finding import ClockSkew, Diagnosis, Finding
from pipeline.doctor.links import LARGE_BYTES, check_pairs
from pipeline.doctor.node import Job, examine, versions
from pipeline.doctor.ranks import clock_finding, pair_findings, version_findings
from pipeline.plan.explain import message_bytes
from pipeline.ranks import launcher
from pipeline.ranks.attempt import launcher_serves
from pipeline.ranks.clocks import clock_offset
from pipeline.ranks.runtime import Runtime

FLOAT_BYTES = 4
Tell = Callable[[Finding], None]


def diagnose(
    config: Config,
    *,
    run_dir: Path | None = None,
    seconds: float = 5.0,
    sized: bool = False,
    tell: Tell = lambda finding: None,
) -> Diagnosis:
    """Look at this node and, under torchrun, at all ranks of the job. Collective.

    Args:
        config: its ``runtime`` section decides on devices and deadlines, its batches how much memory loaders share.
        run_dir: where results are to go; default ``runs``.
        seconds: that the check of all neighbours takes, about.
        sized: send messages of the sizes that ``config`` makes, and not of 16 MiB.
        tell: called with each finding as soon as there is one; on rank 0 only.

    Returns:
        On rank 0 everything; on other ranks what concerns their node.

    Raises:
        ConfigError: the configuration cannot be placed on so many ranks.
        Exception: on several ranks nothing: a rank that fails, dies or does not answer ends all of them with one line,
            exit code 1 (see :class:`pipeline.ranks.failure.FailureReporter`).
    """
    config = validate(config)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    sizes = message_bytes(config, size) if sized else [(LARGE_BYTES, LARGE_BYTES)] * (size - 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    expected = here if size > 1 else _ranks_to_come(config)
    first_here = int(os.environ.get("LOCAL_RANK", str(rank))) == 0
    job = Job(
        here=expected,
        size=max(size, expected),
        nodes=-(-size // here),
        request=config.runtime.device,
        threads=config.runtime.threads,
        batch_bytes=_batch_bytes(config),
        run_dir=run_dir or Path("runs"),
        serves=launcher_serves(),
        first=rank < here,  # ranks are consecutive on a node
    )
    node = f"node {os.environ.get('GROUP_RANK', '?')} ({socket.gethostname()})"
    told = _Told(tell if rank == 0 else lambda finding: None)
    for finding in examine(job) if first_here else ():
        told.add(finding if job.nodes == 1 else dataclasses.replace(finding, node=node))
    if size == 1:
        return Diagnosis(1, tuple(told.findings))
    settings = config.runtime
    with Runtime(settings.device, settings.threads, settings.deadline_s) as runtime:
        diagnosis = _together(runtime, told, sizes, seconds, node)
    if rank == 0 and not diagnosis.fit:
        launcher.tell(diagnosis.verdict, refused=True)
    return diagnosis


class _Told:
    """What has been told so far."""

    def __init__(self, tell: Tell) -> None:
        self.findings: list[Finding] = []
        self._tell = tell

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self._tell(finding)


def _ranks_to_come(config: Config) -> int:
    """How many ranks this node would have, if this process is not one of several: one per GPU."""
    gpus = torch.cuda.device_count() if config.runtime.device != "cpu" else 0
    return max(1, min(gpus, config.local_modules))


def _batch_bytes(config: Config) -> int:
    """Of a batch of images as floats; images of files have the size that they are decoded to."""
    data = config.data
    shape = CATALOGUE[data.name].image_shape if data.name in CATALOGUE else (3, data.image_size, data.image_size)
    return data.batch_size * math.prod(shape) * FLOAT_BYTES


def _together(runtime: Runtime, told: _Told, sizes: list[tuple[int, int]], seconds: float, node: str) -> Diagnosis:
    """What takes all ranks."""
    team, failures = runtime.team, runtime.failures
    failures.describe("in the doctor")
    failures.progress(0, 0, "comparing versions")
    gathered = team.gather((versions(), told.findings))
    for _, findings in (gathered or [])[1:]:
        for finding in findings:
            told.add(finding)
    for finding in version_findings([held for held, _ in gathered]) if gathered else ():
        told.add(finding)
    failures.progress(0, 0, "comparing clocks")
    offset = clock_offset(team, time.time)
    clocks = team.gather(ClockSkew(team.rank, -offset.seconds, offset.error_s))
    if clocks:
        told.add(clock_finding(clocks[1:]))
    pairs = check_pairs(runtime, sizes, seconds, team.collect("its node", node))
    for finding in pair_findings(pairs) if pairs else ():
        told.add(finding)
    return Diagnosis(team.size, tuple(told.findings), pairs, tuple((clocks or [])[1:]))
