"""A training script that breaks on purpose: ``faulty_train.py FOLDER MODE RANK STEP``.

Every rank notes its process id in FOLDER; the failing one notes the time just before it fails.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from pipeline import load_config, train
from pipeline.schedule import Action

FOLDER, MODE, RANK, STEP = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ME = int(os.environ["RANK"])
(FOLDER / f"pid{ME}").write_text(str(os.getpid()))


def before_action(step: int, action: Action) -> None:
    if ME != RANK or step != STEP:
        return
    (FOLDER / "failed").write_text(str(time.time()))
    if MODE == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if MODE == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise ValueError("boom in the middle of a step")


settings = [
    "model.name=resnet20",
    "model.modules=3",
    "data.batch_size=16",
    "runtime.device=cpu",
    "runtime.threads=1",
    f"runtime.deadline_s={3 if MODE == 'stop' else 60}",
]
train(load_config(assignments=settings), run_dir=FOLDER / "run", quiet=True, before_action=before_action)
