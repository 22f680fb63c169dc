"""The command torchrun and its ranks before they have imported torch: signals, kills, stops, refusals.

Jobs of the real command: launch/train.py on two ranks; ``MARK`` makes a rank do something while it starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from helpers_spawn import run_ranks
from tiny import Batches, network, tiny_config

import pipeline
from pipeline import LoaderData, train
from pipeline.base.errors import ConfigError, InUseError
from pipeline.ranks import launcher
from pipeline.ranks.command import command
from pipeline.ranks.process import Process

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = """
import sys, pipeline
pipeline.load_config(assignments=["method.name=dgl"])
try:
    pipeline.load_config(assignments=["method.name=xx"])
except pipeline.ConfigError:
    pass
assert "torch" not in sys.modules
assert pipeline.train.__module__ == "pipeline.run.train" and "torch" in sys.modules
assert "torchvision" not in sys.modules  # which takes a second, and most jobs do without
"""
IN_START_UP = """
import os, signal, sys, time
sys.argv = [sys.argv[1], *sys.argv[2:]]
import pipeline
from pipeline.ranks import launcher

def act() -> None:
    if os.environ["RANK"] == "1":
        while not launcher.siblings():  # a rank that has no handler yet can say nothing
            time.sleep(0.01)
        os.kill({target}, signal.{signal})

load_config = pipeline.load_config

def load_and_act(*arguments):
    act()  # handlers and nothing else: torch has not been imported
    assert "torch" not in sys.modules
    return load_config(*arguments)

pipeline.load_config = load_and_act
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


@dataclass
class Ended:
    """How torchrun ended, what it printed, after how many seconds."""

    code: int
    output: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What localpipe itself wrote."""
        return [line for line in self.output.splitlines() if line.startswith("localpipe:")]


def torchrun(*arguments: str, restarts: int = 0) -> Ended:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    agent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = agent.communicate(timeout=120)
    finally:
        agent.kill()
    return Ended(agent.returncode, output, time.monotonic() - began)


def test_a_configuration_is_refused_without_torch_and_training_needs_no_torchvision() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True, cwd=ROOT, timeout=60)


def test_public_names_are_those_that_a_type_checker_sees() -> None:
    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)
    text = (ROOT / "pipeline" / "__init__.py").read_text()
    seen = {}
    for module, names in re.findall(r"^    from (pipeline[\w.]+) import (.+)$", text, re.MULTILINE):
        seen[module] = tuple(names.split(", "))
    assert seen == pipeline._NEED_TORCH
    with pytest.raises(AttributeError, match="no attribute 'xx'"):
        pipeline.xx  # noqa: B018


def test_torchrun_refuses_once_and_ends_with_our_line() -> None:
    """Before the change: 4 refusals, and 39 lines of torchrun below the last one, none of them ours."""
    ended = torchrun("launch/train.py", "--set", "method.name=xx", restarts=3)
    assert ended.code != 0
    assert len(ended.lines) == 1 and "method.name = 'xx'" in ended.lines[0]
    below = [line for line in ended.output.partition(ended.lines[0])[2].splitlines() if line]
    assert "method.name = 'xx'" in below[-2] and set(below[-1]) == {"="}
    assert sum("rank      : " in line for line in below) == 1, ended.output  # the other rank is not listed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "signal", "words"),
    [
        ("os.getpid()", "SIGTERM", "stopped by SIGTERM on rank 1 before step 0; nothing was trained"),
        ("os.getppid()", "SIGTERM", "before step 0; nothing was trained"),
        ("os.getpid()", "SIGKILL", "rank 1 died without a message while it started"),
        ("os.getpid()", "SIGSTOP", "rank 0 has waited 8 s for rank 1 to start"),
    ],
)
def test_a_signal_in_start_up_has_a_line(tmp_path: Path, target: str, signal: str, words: str) -> None:
    script = tmp_path / "job.py"
    script.write_text(IN_START_UP.format(target=target, signal=signal))
    settings = ["--run-dir", str(tmp_path / "run"), "--set", "runtime.deadline_s=8", "--set", "runtime.device=cpu"]
    ended = torchrun(str(script), str(ROOT / "launch" / "train.py"), *settings)
    assert len(ended.lines) == 1 and words in ended.lines[0], ended.output
    assert (ended.code == 0) == (signal == "SIGTERM" and target == "os.getpid()")
    assert "Unable to shutdown" not in ended.output and "forcefully" not in ended.output


# -- one process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of the only rank in the first attempt of a torchrun."""
    for attempt in (0, 1):
        (tmp_path / f"attempt_{attempt}" / "0").mkdir(parents=True)
    monkeypatch.setenv(launcher.FILE, str(tmp_path / "attempt_0" / "0" / "error.json"))
    return tmp_path


@pytest.mark.parametrize(("error", "again"), [(ConfigError("no"), False), (InUseError("not now"), True)])
def test_what_may_pass_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, again: bool
) -> None:
    runs = []

    def main() -> int:
        runs.append(1)
        raise error

    assert command(main, trains=True) == 2
    monkeypatch.setenv(launcher.FILE, str(folder / "attempt_1" / "0" / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert command(main, trains=True) == 2
    assert len(runs) == 1 + again


def refuses() -> int:
    raise ConfigError("no")


def test_a_rank_that_refuses_as_well_waits_for_torchrun_and_is_no_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun would list it in seven lines."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    torchrun_ends_it = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    torchrun_ends_it.start()
    try:
        assert command(refuses, trains=True) == 0
    finally:
        torchrun_ends_it.cancel()
    assert capsys.readouterr().err == ""


def test_the_first_rank_waits_until_the_others_can_be_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    other = folder / "attempt_0" / "1"
    other.mkdir()
    here = json.dumps(asdict(Process.current("starting")))
    comes = threading.Timer(0.1, (other / launcher.PROCESS).write_text, (here,))
    comes.start()
    assert command(refuses, trains=True) == 2
    assert list(launcher.siblings()) == [1]
    comes.join()


def stopped_in_start_up(rank: int, folder: str) -> int:
    """The exit code of a command whose only process gets SIGTERM before it trains, and its output in a file."""

    def main() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        run = train(
            tiny_config(), network=network(), data=LoaderData(Batches(), Batches()), run_dir=Path(folder) / "run"
        )
        assert run["step"] == 0
        return 0

    with open(Path(folder) / "output", "w") as file, contextlib.redirect_stdout(file):
        return command(main, trains=True)


def test_a_signal_in_start_up_stops_one_process_in_order(tmp_path: Path) -> None:
    (result,) = run_ranks(stopped_in_start_up, 1, str(tmp_path))
    assert (result.exit_code, result.value) == (0, 0), result.stderr
    (line,) = (tmp_path / "output").read_text().splitlines()
    assert line.startswith("localpipe: stopped by SIGTERM on rank 0 before step 0; nothing was trained")


def test_what_nobody_expected_keeps_its_traceback() -> None:
    def main() -> int:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command(main)
