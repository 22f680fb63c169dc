"""Many training runs as processes of their own, in turn or side by side, that any interruption may end: started again,
each goes on from its newest checkpoint, and those that are complete are left alone.

    waiting --start--> active: localpipe train --run-dir FOLDER --resume auto --summary.json--> complete
       ^                  |  SIGTERM, ctrl-C, or the file STOP: each saves a checkpoint and ends
       +---- next time ---+  SIGKILL: the kernel ends them too; they go on from the last checkpoint
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pipeline import Config, ConfigError, to_toml

STOP = "STOP"
"""Name of the file that ends all runs below its folder."""
POLL_S = 0.2
PARENT_DIES = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class TrainingRun:
    """One run: what is trained, and where."""

    config: Config
    folder: Path

    @property
    def complete(self) -> bool:
        """Whether it has ended in order."""
        return (self.folder / "summary.json").is_file()

    def command(self, ranks: int) -> list[str]:
        """What starts it, or lets it go on."""
        words = ["train", "--config", str(self.config_file), "--run-dir", str(self.folder), "--resume", "auto"]
        words += ["--quiet", *(["--nproc", str(ranks)] if ranks > 1 else [])]
        return [sys.executable, "-m", "pipeline", *words]

    @property
    def config_file(self) -> Path:
        return self.folder.with_suffix(".toml")

    @property
    def log(self) -> Path:
        """What it prints, over all its starts."""
        return self.folder.with_suffix(".log")


@dataclass
class Outcome:
    """Why runs were stopped, empty when all were tried; a line for each that failed."""

    stopped: str = ""
    failed: list[str] = field(default_factory=list)


def run_all(runs: Sequence[TrainingRun], stop: Path, ranks: int = 1, side_by_side: int = 1) -> Outcome:
    """Run those that are not complete, ``side_by_side`` at a time, each on so many ranks.

    A run that fails does not end the others. SIGTERM, SIGINT, or a file ``stop`` end all of them, each with a
    checkpoint.

    Raises:
        ConfigError: the file is there already.
    """
    if stop.exists():
        raise ConfigError(f"'{stop}' is there, which stops all runs; remove it to go on")
    outcome = Outcome()
    waiting = [run for run in runs if not run.complete]
    active: dict[TrainingRun, subprocess.Popen[bytes]] = {}
    with _noted_signals() as noted:
        try:
            while waiting or active:
                if not outcome.stopped and (noted or stop.exists()):
                    outcome.stopped = signal.Signals(noted[0]).name if noted else f"'{stop}'"
                    waiting.clear()
                    for process in active.values():
                        process.terminate()
                while waiting and len(active) < side_by_side:
                    run = waiting.pop(0)
                    print(f"{time.strftime('%H:%M:%S')} {run.folder.name}: begins, {len(waiting)} wait", flush=True)
                    active[run] = _start(run, ranks)
                for run in [run for run, process in active.items() if process.poll() is not None]:
                    _ended(run, active.pop(run).returncode, outcome)
                time.sleep(POLL_S)
        finally:
            for process in active.values():
                process.kill()
                process.wait()
    return outcome


def _start(run: TrainingRun, ranks: int) -> subprocess.Popen[bytes]:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    run.config_file.write_text(to_toml(run.config), encoding="utf-8")
    with open(run.log, "ab") as log:  # a session of its own: ctrl-C comes through us, once
        return subprocess.Popen(
            run.command(ranks), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=_end_with_parent() if sys.platform == "linux" else None,
        )  # fmt: skip


def _ended(run: TrainingRun, code: int, outcome: Outcome) -> None:
    if run.complete:
        print(f"{time.strftime('%H:%M:%S')} {run.folder.name}: complete", flush=True)
    elif not outcome.stopped:
        lines = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        outcome.failed.append(f"{run.folder.name} failed with code {code}: {lines[-1]} (all of it in {run.log})")
        print(outcome.failed[-1], file=sys.stderr, flush=True)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are put into a list."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> Callable[[], object]:
    """For the child: the kernel sends it SIGTERM when we die, so that no run is left behind."""
    library = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may be imported
    return lambda: library.prctl(PARENT_DIES, int(signal.SIGTERM))
