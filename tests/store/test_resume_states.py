"""What a key makes a run keep from step to step is in its checkpoint: resumed in the middle of an epoch, the weights
are those of the run that was never disturbed, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import Batches, network, tiny_config

from pipeline import LoaderData, train
from pipeline.store.checkpoint import FOLDER

CASES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {  # cascade span, sections
    "level weights": (2, {"hierarchy": {"cascade_weight": [1.0, 0.1], "independent_weight": [0.5, 2.0]}}),
    "muon, async": (
        2, {"optim": {"name": "muon", "lr": 0.01, "error_feedback": True}, "schedule": {"kind": "async"}}
    ),
    "accumulate": (2, {"train": {"epochs": 2, "accumulate": 4}}),
    "accumulate, async": (2, {"train": {"epochs": 2, "accumulate": 3}, "schedule": {"kind": "async"}}),
    "ema": (2, {"train": {"epochs": 2, "ema": 0.9}}),
    "ema, async": (2, {"train": {"epochs": 2, "ema": 0.9}, "schedule": {"kind": "async"}}),
}


def run(case: str, folder: Path, resume: str = "auto", seed: int = 7, **checkpoint: int) -> dict[str, Any]:
    span, sections = CASES[case]
    config = tiny_config("greedy", "plain", span, 3, **{"train": {"epochs": 2}, "checkpoint": checkpoint, **sections})
    data = LoaderData(Batches(), [next(iter(Batches()))])
    return train(config, network=network(seed), data=data, run_dir=folder, resume=resume, quiet=True)


@pytest.mark.parametrize("case", CASES)
def test_a_resume_in_the_middle_of_an_epoch_is_bit_for_bit(case: str, tmp_path: Path) -> None:
    alone = run(case, tmp_path / "alone", every_steps=7, every_epochs=0)
    saved = tmp_path / "alone" / FOLDER / "step-00000007"
    resumed = run(case, tmp_path / "resumed", str(saved), seed=8, every_epochs=0)
    assert resumed["weights_sha256"] == alone["weights_sha256"]
    assert resumed["train_loss"] == alone["train_loss"]
    assert resumed["ema_metrics"] == alone["ema_metrics"]
