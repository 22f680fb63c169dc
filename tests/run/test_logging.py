"""A run with loggers: what they have is what metrics.jsonl has, after a kill, a stop and two resumptions too."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_spawn import run_ranks
from tiny import STEPS, Batches, network, tiny_config

from pipeline import ConfigError, LoaderData, read_metrics, train
from pipeline.cli.main import main
from pipeline.report import loggers
from pipeline.report.scalars import scalars

EPOCHS = 5


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard reads the event files."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={reader.SCALARS: 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def trained(rank: int, folder: str, end: tuple[int, int] | None) -> Any:
    """Train to the end, or send this process a signal before a step: (signal, step)."""

    def before_action(step: int, action: object) -> None:
        if end is not None and step == end[1]:
            limit = time.monotonic() + 30
            while not wrote(Path(folder), step // STEPS) and time.monotonic() < limit:
                time.sleep(0.02)  # the thread of the logger still loads its package
            os.kill(os.getpid(), end[0])

    config = tiny_config(modules=2, train={"epochs": EPOCHS}, log={"to": ["tensorboard"], "curve": False})
    data = LoaderData(Batches(), Batches())
    return train(
        config, network=network(), data=data, run_dir=Path(folder), quiet=True, before_action=before_action
    )


def wrote(folder: Path, epochs: int) -> bool:
    """Whether the event files hold so many epochs."""
    return (folder / "tensorboard").is_dir() and len(logged(folder).get("epoch", [])) >= epochs


@pytest.mark.slow
def test_killed_stopped_and_resumed_it_has_every_point_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (killed,) = run_ranks(trained, 1, str(tmp_path), (signal.SIGKILL, 2 * STEPS + 2))
    assert killed.exit_code == -signal.SIGKILL
    assert [step for step, _ in logged(tmp_path)["epoch"]] == [STEPS, 2 * STEPS]  # readable, and complete
    (stopped,) = run_ranks(trained, 1, str(tmp_path), (signal.SIGTERM, 3 * STEPS + 2))
    assert stopped.exit_code == 0 and stopped.value["stopped"], stopped.stderr
    (whole,) = run_ranks(trained, 1, str(tmp_path), None)
    assert whole.exit_code == 0 and whole.value["steps"] == EPOCHS * STEPS, whole.stderr
    expected: dict[str, list[tuple[int, Any]]] = {}
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        for tag, value in scalars(record).items():
            expected.setdefault(tag, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    assert logged(tmp_path) == expected and len(expected["train/loss"]) == EPOCHS


class Silent:
    """A logger that never comes back."""

    def __init__(self, run_dir: Path, config: Any, past: Any) -> None:
        time.sleep(60)

    def record(self, record: Any) -> None:
        raise AssertionError

    close = record


def test_a_logger_that_hangs_holds_up_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(loggers.OPENERS, "tensorboard", Silent)
    monkeypatch.setattr(loggers, "CLOSE_S", 0.1)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: name)
    config = tiny_config(modules=2, train={"epochs": 2}, log={"to": ["tensorboard"]})
    summary = train(config, network=network(), data=LoaderData(Batches(), Batches()), run_dir=tmp_path, quiet=True)
    assert summary["epochs"] == 2 and len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert capsys.readouterr().err.count("localpipe warning: logger tensorboard did not end in time") == 1


def test_a_package_that_is_missing_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    config = tiny_config(modules=2, log={"to": ["wandb"]})
    with pytest.raises(ConfigError, match=r"pip install localpipe\[wandb\]"):
        train(config, network=network(), data=LoaderData(Batches(), Batches()), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    words = ["train", "--nproc", "2", "--set", 'log.to=["tensorboard"]']  # not even torchrun starts
    monkeypatch.setattr(sys, "argv", ["localpipe", *words])
    monkeypatch.setattr("os.execv", lambda *words: pytest.fail("torchrun has been started"))
    assert main() == 2
    refusal = capsys.readouterr().err
    assert "the package tensorboard is not installed" in refusal and refusal.count("\n") == 1


def test_the_curve_is_drawn_at_the_end_and_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    config = tiny_config(modules=2, train={"epochs": 1}, log={"curve": True})
    data = LoaderData(Batches(), Batches())
    assert not math.isnan(train(config, network=network(), data=data, run_dir=tmp_path / "a")["train_loss"])
    assert (tmp_path / "a" / "curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("pipeline.run.ending.plot_curve", lambda *_: 1 / 0)
    assert train(config, network=network(), data=data, run_dir=tmp_path / "b")["epochs"] == 1
    assert "curve.png could not be drawn: ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr("pipeline.run.ending.importlib.util.find_spec", lambda name: None)
    assert train(config, network=network(), data=data, run_dir=tmp_path / "c")["epochs"] == 1
    assert capsys.readouterr().out.count("pip install localpipe[plot]") == 1 and not (tmp_path / "c/curve.png").exists()
