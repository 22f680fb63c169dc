"""A training job to break: ``job.py FOLDER``, with the settings and the faults in FOLDER/job.json.

    {"settings": {...}, "span": 2, "epochs": 2, "steps": 20, "tests": 5, "pause_s": 0.0, "test_pause_s": 0.0,
     "open_pause_s": 0.0, "resume": "auto", "run_dir": "run", "faults": [fault, ...]}
    fault: {"rank": 1, "step": 7, "do": "kill"}, each once in the life of the job, in this order. Step -1: before
    ``train`` has anything to do; step 100: when the first stage reads its third batch of a test. With "attempt": 3 not
    before the third restart: a rank may be steps ahead of the one that has just died

Every process notes its pid in FOLDER/pids; rank 0 writes what ``train`` returned to FOLDER/result.json. A fault leaves
FOLDER/fault-<number> with the time just before it. Where there is a checkpoint the network begins with other weights:
who begins anew instead of going on from it does not end with the weights of the undisturbed job.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny import tiny_batch, tiny_blocks, tiny_config

from pipeline import LoaderData, train
from pipeline.ranks.failure import FailureReporter
from pipeline.stage.schedule import Action
from pipeline.store import checkpoint

ROWS = 8
START, TEST = -1, 100
"""Steps of faults at other times."""


class Batches:
    """Fixed random images, another order in every epoch."""

    batch_size = ROWS

    def __init__(self, steps: int, open_pause_s: float = 0.0) -> None:
        self._steps = steps
        self._open_pause_s = open_pause_s

    def __len__(self) -> int:
        time.sleep(self._open_pause_s)
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in torch.randperm(self._steps).tolist():
            batch = tiny_batch(step, ROWS)
            yield batch.image, batch.labels


def network(folder: Path) -> nn.Sequential:
    torch.manual_seed(8 if list(folder.glob("**/checkpoints/step-*")) else 7)
    return nn.Sequential(tiny_blocks())


class Tests(Batches):
    """The images to test on, slowly, with a fault in the middle."""

    def __init__(self, steps: int, pause_s: float, faults: Faults) -> None:
        super().__init__(steps)
        self._pause_s = pause_s
        self._faults = faults

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(super().__iter__()):
            time.sleep(self._pause_s)
            if number == 2:
                self._faults.at(TEST)
            yield batch


class Faults:
    """The hook before every action."""

    def __init__(self, folder: Path, rank: int, job: dict[str, Any], model: nn.Sequential) -> None:
        self._folder = folder
        self._rank = rank
        self._pause_s = job["pause_s"]
        self._faults = job["faults"]
        self._attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._model = model
        self._write_module = checkpoint.write_module

    def __call__(self, step: int, action: Action) -> None:
        time.sleep(self._pause_s)
        self.at(step)

    def at(self, step: int) -> None:
        """Break what is to be broken at ``step``."""
        for number, fault in enumerate(self._faults):
            if (self._folder / f"fault-{number}").exists():
                continue
            if fault.get("attempt", 0) > self._attempt:
                return
            if fault["rank"] == self._rank and (step == fault["step"] or fault["step"] <= step < TEST):
                (self._folder / f"fault-{number}").write_text(str(time.time()))
                getattr(self, fault["do"])()
            return  # the next one only after this one

    def _await_checkpoint(self) -> None:
        """Let one be complete first, however slow this machine is; it is written by threads."""
        end = time.monotonic() + 15.0
        while not list(self._folder.glob("run/checkpoints/step-*")) and time.monotonic() < end:
            time.sleep(0.05)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_node(self) -> None:
        """The whole machine is gone: the agent first, which would start this process again."""
        os.kill(os.getppid(), signal.SIGKILL)
        self.kill()

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def term(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def stop_launcher(self) -> None:
        os.kill(os.getppid(), signal.SIGSTOP)

    def term_launcher(self) -> None:
        os.kill(os.getppid(), signal.SIGTERM)

    def interrupt_launcher(self) -> None:
        os.kill(os.getppid(), signal.SIGINT)

    def interrupt(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def raises(self) -> None:
        raise ValueError("boom in the middle of a step")

    def kill_in_save(self) -> None:
        """Die in the next save, when half of its files are written."""
        self._await_checkpoint()

        def write_then_die(partial: Path, index: int, state: dict[str, Tensor]) -> Any:
            self._write_module(partial, index, state)
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.write_module = write_then_die

    def save_slowly(self) -> None:
        """Let this rank take two seconds for every module that it saves."""

        def write_slowly(partial: Path, index: int, state: dict[str, Tensor]) -> Any:
            time.sleep(2.0)
            return self._write_module(partial, index, state)

        checkpoint.write_module = write_slowly

    def term_in_save(self) -> None:
        """Let saves take a second, and ask for a stop in the middle of the next."""

        def write_slowly(partial: Path, index: int, state: dict[str, Tensor]) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
            return self._write_module(partial, index, state)

        checkpoint.write_module = write_slowly

    def fill_disk(self) -> None:
        """From now on no file may grow beyond 16 KiB: writing more fails as on a full disk."""
        self._await_checkpoint()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))

    def free_disk(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def make_read_only(self) -> None:
        """Let the directory of the checkpoints be one that may only be read, even by root."""
        self._await_checkpoint()
        folder = str(self._folder / "run" / "checkpoints")
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        end = time.monotonic() + 15.0
        while subprocess.run(["mount", "-o", "remount,bind,ro", folder], capture_output=True).returncode:
            assert time.monotonic() < end, "the directory stays busy"  # with a save that has a file open for writing
            time.sleep(0.05)

    def rename_run(self) -> None:
        """Give the run directory another name while the job works in it."""
        self._await_checkpoint()
        (self._folder / "run").rename(self._folder / "moved")

    def replace_run(self) -> None:
        """Let another job begin in its place."""
        self.rename_run()
        (self._folder / "run").mkdir()
        (self._folder / "run" / ".lock").touch()

    def delete_run(self) -> None:
        """Delete the run directory; other ranks may be saving into it."""
        self._await_checkpoint()
        while (self._folder / "run").exists():
            shutil.rmtree(self._folder / "run", ignore_errors=True)

    def poison(self) -> None:
        """A weight becomes NaN, so the next loss does."""
        with torch.no_grad():
            next(self._model[self._rank + 1].parameters()).fill_(float("nan"))

    def exhaust_memory(self) -> None:
        """Leave this process 64 MiB more than it has, then need more."""
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 64 * 2**20, resource.RLIM_INFINITY))
        torch.zeros(2**28)


def strike_at_start(faults: Faults) -> None:
    """Let the faults at START strike as soon as the job handles signals."""
    stop_gracefully = FailureReporter.stop_gracefully

    def and_break(reporter: FailureReporter) -> None:
        stop_gracefully(reporter)
        faults.at(START)

    FailureReporter.stop_gracefully = and_break


def main(rank: int, folder: str) -> dict[str, Any]:
    """One rank of the job; returns what ``train`` does."""
    here = Path(folder)
    job = json.loads((here / "job.json").read_text())
    os.chdir(here)  # without a run directory the run goes to a new one below this
    (here / "pids").mkdir(exist_ok=True)
    (here / "pids" / f"{rank}-{os.getpid()}").touch()
    settings: dict[str, dict[str, Any]] = {
        "train": {"epochs": job["epochs"]},
        "checkpoint": {"every_steps": 5},
        "runtime": {"device": "cpu", "threads": 1, "deadline_s": 20.0},
    }
    for section, entries in job["settings"].items():
        settings.setdefault(section, {}).update(entries)
    config = tiny_config("dgl", "hpff", job["span"], 4, **settings)
    model = network(here)
    faults = Faults(here, rank, job, model)
    if any(fault["step"] == START for fault in job["faults"]):
        strike_at_start(faults)
    result = train(
        config,
        network=model,
        data=LoaderData(Batches(job["steps"], job["open_pause_s"]), Tests(job["tests"], job["test_pause_s"], faults)),
        run_dir=here / job["run_dir"] if job["run_dir"] else None,
        resume=job["resume"],
        quiet=True,
        before_action=faults,
    )
    if rank == 0:
        (here / "result.json").write_text(json.dumps(result))
    return result


if __name__ == "__main__":
    main(int(os.environ["RANK"]), sys.argv[1])
