"""Memory of a rank stays flat over a long run, and what is in flight does not depend on the number of ranks."""

from __future__ import annotations

import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from tiny import CLASSES, tiny_config
from torch import nn

from pipeline import LoaderData, train
from pipeline.local.local_module import LocalModule
from pipeline.stage.schedule import Action

pytestmark = pytest.mark.long

STEPS = 1000
SETTLED = 300
SAMPLED = 100
ROWS = 8
SCHEDULES = {
    "exact": {"kind": "exact"},
    "async": {"kind": "async", "delay": 2},
    "free": {"kind": "free", "ring": 2},
}
PAGE = resource.getpagesize()


class Noise:
    """Batches of fixed noise, 3 x 16 x 16."""

    batch_size = ROWS

    def __init__(self, batches: int) -> None:
        self._batches = batches
        generator = torch.Generator().manual_seed(0)
        self._image = torch.randint(0, 256, (ROWS, 3, 16, 16), generator=generator, dtype=torch.uint8)
        self._labels = torch.arange(ROWS) % CLASSES

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Any:
        for _ in range(self._batches):
            yield self._image, self._labels


def network() -> nn.Sequential:
    """Four blocks whose activations of one batch take 128 KiB each: a leak of one per step is 90 MiB in 700 steps."""
    torch.manual_seed(0)
    blocks = OrderedDict((f"block{i}", nn.Conv2d(3 if i == 0 else 16, 16, 1)) for i in range(4))
    blocks["classifier"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))
    return nn.Sequential(blocks)


def long_runs(rank: int, folder: str, steps: int) -> dict[str, tuple[int, int, int, int]]:
    """By schedule: growth of the resident set in bytes after step SETTLED, samples of it, most batches in flight, most
    copies of weights."""
    found = {}
    most = copies = 0
    forward = LocalModule.forward

    def counted(self: LocalModule, *arguments: Any) -> Any:
        nonlocal most, copies
        h = forward(self, *arguments)
        most = max(most, len(self.in_flight))
        copies = max(copies, len(self.stashes or ()))
        return h

    LocalModule.forward = counted  # type: ignore[method-assign]
    for name, schedule in SCHEDULES.items():
        sizes: dict[int, int] = {}
        most = copies = 0

        def before_action(step: int, action: Action, sizes: dict[int, int] = sizes) -> None:
            if step not in sizes and step % SAMPLED == 0:
                sizes[step] = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

        span = 1 if name == "free" else 2
        train(
            tiny_config("greedy", "plain", span, 5, schedule=schedule, train={"epochs": 1}, optim={"lr": 1e-3}),
            network=network(),
            data=LoaderData(Noise(steps), Noise(1)),
            run_dir=Path(folder) / name,
            quiet=True,
            before_action=before_action,
        )
        late = [size for step, size in sorted(sizes.items()) if step >= SETTLED]
        found[name] = (late[-1] - late[0] if late else 0, len(late), most, copies)
    return found


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_steps(tmp_path: Path) -> None:
    results = run_ranks(long_runs, 3, str(tmp_path), STEPS, timeout_s=300)
    assert [result.exit_code for result in results] == [0, 0, 0], [result.stderr for result in results]
    for result in results:
        for name, (growth, samples, _, copies) in result.value.items():
            assert growth < 8 * 2**20, (result.rank, name, growth)
            assert copies <= 3  # of the batch at work and of two that are late
            # A free stage takes as many steps as it can, which may be fewer than the first stage's.
            assert samples >= (STEPS - SETTLED) // SAMPLED or (name == "free" and result.rank > 0 and samples > 1)


def test_what_is_in_flight_depends_on_the_delay_and_not_on_the_ranks(tmp_path: Path) -> None:
    for ranks in (2, 5):
        results = run_ranks(long_runs, ranks, str(tmp_path / str(ranks)), 12, timeout_s=60)
        assert [result.exit_code for result in results] == [0] * ranks, [result.stderr for result in results]
        most = {name: max(result.value[name][2] for result in results) for name in SCHEDULES}
        assert most == {"exact": 1, "async": 3, "free": 1}
        copies = {name: max(result.value[name][3] for result in results) for name in SCHEDULES}
        assert copies == {"exact": 0, "async": 3, "free": 0}
