"""NCCL's watchdog, and the calls that make its groups: on a fake process group, which moves nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.ranks.nccl import BLOCKING, HANDLING, HEARTBEAT, leave_failures_to_us
from pipeline.ranks.runtime import Runtime
from pipeline.ranks.team import Team

VARIABLES = (HANDLING, BLOCKING, HEARTBEAT)


def test_the_watchdog_leaves_failures_to_us_where_nothing_else_is_asked_for() -> None:
    environment: dict[str, str] = {}
    assert leave_failures_to_us(environment, 300.0) == []
    assert environment == {HANDLING: "0", BLOCKING: "0", HEARTBEAT: "600"}
    assert leave_failures_to_us(environment, 300.0) == []  # as after a restart by torchrun


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (HANDLING, "3", "NCCL ends a process whose transfer has failed before it can say which rank is gone; "),
        (BLOCKING, "1", "the host waits for every transfer"),
        (HEARTBEAT, "60", "NCCL may end a process within runtime.deadline_s = 90, before it can say who waits"),
        (HEARTBEAT, "soon", "NCCL may end a process within"),
    ],
)
def test_what_is_set_stays_and_one_line_says_what_it_means(name: str, value: str, said: str) -> None:
    environment = {name: value}
    (line,) = leave_failures_to_us(environment, 90.0)
    assert environment[name] == value
    assert line.startswith(f"{name}={value} in the environment: {said}") and "; unset it, or use " in line


def test_a_monitor_that_waits_longer_than_we_do_is_nothing_to_say() -> None:
    environment = {HEARTBEAT: "91"}
    assert leave_failures_to_us(environment, 90.0) == [] and environment[HEARTBEAT] == "91"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Of ``init_process_group`` and ``new_group``, whose groups are fake, with the environment that they found."""
    noted: list[tuple[str, dict[str, Any]]] = []
    initialise, new_group = dist.init_process_group, dist.new_group

    def init_process_group(backend: str, **given: Any) -> None:
        noted.append((backend, {**given, "environment": {name: os.environ.get(name) for name in VARIABLES}}))
        initialise("fake", rank=given["rank"], world_size=given["world_size"], store=FakeStore())

    def make_group(ranks: Any = None, timeout: Any = None, backend: str = "", **given: Any) -> Any:
        noted.append((backend, {"ranks": ranks, "timeout": timeout}))
        return new_group(ranks, timeout, "fake")

    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(dist, "new_group", make_group)
    yield noted
    dist.destroy_process_group()


@pytest.mark.parametrize("blocking", ["", "1"])
def test_groups_are_made_on_the_device_of_the_rank_once_the_watchdog_knows(
    calls: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    blocking: str,
) -> None:
    if blocking:
        monkeypatch.setenv(BLOCKING, blocking)
    runtime = Runtime(deadline_s=40.0)
    runtime.team = Team(0, 2, dist.HashStore(), deadline_s=40.0)
    runtime.device, runtime.backend = torch.device("cuda", 3), "nccl"
    runtime._init_groups()
    (backend, given), (beside, of_beside) = calls
    assert (backend, given["device_id"], given["timeout"]) == ("nccl", torch.device("cuda", 3), timedelta(seconds=40))
    assert given["environment"] == {HANDLING: "0", BLOCKING: blocking or "0", HEARTBEAT: "480"}
    assert (beside, of_beside["timeout"]) == ("gloo", timedelta(seconds=40))
    assert ("TORCH_NCCL_BLOCKING_WAIT=1 in the environment" in capsys.readouterr().err) == bool(blocking)
