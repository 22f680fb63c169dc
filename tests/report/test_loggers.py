"""Loggers get what metrics.jsonl gets; one that fails or hangs costs a line and nothing else."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from helpers_spawn import run_ranks

from pipeline import ConfigError, load_config
from pipeline.report import loggers
from pipeline.report.loggers import Loggers, refuse_missing_loggers
from pipeline.report.scalars import scalars
from pipeline.report.tensorboard_logger import FOLDER, TensorBoardLogger
from pipeline.report.wandb_logger import ID, WandbLogger
from pipeline.store.run_directory import json_ready

CONFIG = {"model": {"name": "resnet32", "modules": 4}, "method": {"task": [0.5, 1.0]}}


@pytest.fixture
def records(sample_run: Callable[..., Any]) -> list[dict[str, Any]]:
    """Five lines of metrics.jsonl."""
    return [json_ready(asdict(sample_run(4, 2).epoch(epoch))) for epoch in range(1, 6)]


def points(run_dir: Path) -> dict[str, dict[int, list[float]]]:
    """Tag -> step -> values, as TensorBoard reads the event files."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run_dir / FOLDER), size_guidance={reader.SCALARS: 0})
    events.Reload()
    found: dict[str, dict[int, list[float]]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault(tag, {}).setdefault(event.step, []).append(event.value)
    return found


def expected(records: list[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """The same of records."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in records:
        for tag, value in scalars(record).items():
            found.setdefault(tag, {})[record["step"]] = [pytest.approx(value, rel=1e-6)]  # float32 in the files
    return found


def test_every_measured_number_has_a_name(sample_run: Callable[..., Any]) -> None:
    record = sample_run(12, 2).epoch(1)
    broken = replace(record.modules[3], losses={"cascade.task": float("nan")}, skipped_steps=7)
    modules = (*record.modules[:3], broken, *record.modules[4:])
    named = scalars(json_ready(asdict(replace(record, modules=modules, test_loss=None))))
    assert named["train/loss"] == record.train_loss and named["test/error_pct"] == record.test_error_pct
    assert named["module 02 loss/independent.task"] == record.modules[2].losses["independent.task"]
    assert named["module 11 test/final.error_pct"] == record.test_error_pct
    assert named["module 03 train/skipped_steps"] == 7 and "module 02 train/skipped_steps" not in named
    assert not {"test/loss", "module 03 loss/cascade.task"} & set(named)  # null is no number
    assert named["rank 1/busy_fraction"] == record.stages[1].busy_fraction


def test_tensorboard_reads_what_was_recorded(records: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path, CONFIG, [])
    for record in records:
        logger.record(record)
        written = points(tmp_path)["epoch"]  # before it is closed
        assert list(written) == [entry["step"] for entry in records[: record["epoch"]]]
    logger.close()
    assert points(tmp_path) == expected(records)


def test_tensorboard_has_no_point_twice_after_a_resumption(records: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = TensorBoardLogger(tmp_path, CONFIG, [])
    for record in records[:4]:
        first.record(record)  # killed: nobody closes it
    again = [{**record, "train_loss": 7.0} for record in records[2:]]
    second = TensorBoardLogger(tmp_path, CONFIG, records[:2])  # the checkpoint was older than the last epoch
    for record in again:
        second.record(record)
    second.close()
    assert points(tmp_path) == expected([*records[:2], *again])


@pytest.mark.parametrize("past", [0, 3])
def test_tensorboard_gets_the_past_where_it_has_none(records: list[dict[str, Any]], tmp_path: Path, past: int) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    TensorBoardLogger(tmp_path, CONFIG, records[:past]).close()
    assert points(tmp_path) == expected(records[:past])
    events = reader.EventAccumulator(str(tmp_path / FOLDER))
    events.Reload()
    (text,) = events.Tensors("configuration/text_summary")
    assert b"`method.task` | `[0.5, 1.0]`" in text.tensor_proto.string_val[0]


def test_a_run_that_begins_anew_hides_what_lay_there(records: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    old = TensorBoardLogger(tmp_path, CONFIG, [])
    for record in records:
        old.record({**record, "train_loss": 7.0})
    old.close()
    new = TensorBoardLogger(tmp_path, CONFIG, [])
    new.record(records[0])
    new.close()
    assert points(tmp_path) == expected(records[:1])


class StandIn(types.ModuleType):
    """``wandb`` as far as its documentation describes it: init, Settings, Run.log with rising steps, Run.finish."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **given: Any) -> StandIn:
        self.begun.append(given)
        return self

    def log(self, data: dict[str, float], step: int) -> None:
        self.logged.append((step, data))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_goes_on_with_the_run_whose_id_is_in_the_run_directory(
    wandb: StandIn, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    for past, new in ((0, 2), (2, 2), (4, 1)):
        logger = WandbLogger(tmp_path, CONFIG, records[:past])
        for record in records[past : past + new]:
            logger.record(record)
        logger.close()
    assert wandb.logged == [(record["step"], scalars(record)) for record in records] and wandb.finished == 3
    assert {begun["id"] for begun in wandb.begun} == {(tmp_path / ID).read_text().strip()}
    assert all(begun["resume"] == "allow" and begun["config"] == CONFIG for begun in wandb.begun)
    assert wandb.begun[0]["name"] == tmp_path.name and wandb.begun[0]["project"] == "localpipe"


def test_wandb_gets_the_past_of_a_run_that_it_does_not_know(
    wandb: StandIn, records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    WandbLogger(tmp_path, CONFIG, records[:3])
    assert [step for step, _ in wandb.logged] == [record["step"] for record in records[:3]]
    WandbLogger(tmp_path, CONFIG, [])  # the run begins anew: another one for W&B as well
    first, second = wandb.begun
    assert first["id"] != second["id"] and second["project"] == "mine"


def offline(rank: int, folder: str, records: list[dict[str, Any]]) -> None:
    """The real package, in a process of its own: it starts a service."""
    os.environ["WANDB_MODE"] = "offline"
    tempfile.tempdir = folder  # it leaves empty directories behind
    loggers.CLOSE_S = 60.0
    run = Loggers(["wandb"], Path(folder), CONFIG)
    run.begin([])
    for record in records:
        run.record(record)
    run.close()


@pytest.mark.slow
def test_the_real_wandb_writes_offline(records: list[dict[str, Any]], tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is None:  # to import it here would leave its directories in this process
        pytest.skip("wandb is not here; pip install localpipe[wandb]")
    (done,) = run_ranks(offline, 1, str(tmp_path), records)
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{(tmp_path / ID).read_text().strip()}.wandb")
    assert b"cascade.error_pct" in file.read_bytes()


class Fake:
    """A logger that can fail or hang at any of the three things it does."""

    def __init__(self, trouble: str, how: Callable[[], object]) -> None:
        self.taken: list[int] = []
        self.closed = False
        self._trouble, self._how = trouble, how

    def opened(self, run_dir: Path, config: Any, past: Any) -> Fake:
        self._meet("open")
        return self

    def record(self, record: Any) -> None:
        self._meet("record")
        self.taken.append(record["step"])

    def close(self) -> None:
        self._meet("close")
        self.closed = True

    def _meet(self, what: str) -> None:
        if what == self._trouble:
            self._how()


def fail() -> None:
    raise OSError("no space\nleft")


@pytest.mark.parametrize("trouble", ["open", "record", "close"])
def test_a_logger_that_fails_is_dropped_with_one_line(
    trouble: str,
    records: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad, good = Fake(trouble, fail), Fake("", fail)
    monkeypatch.setattr(loggers, "OPENERS", {"bad": bad.opened, "good": good.opened})
    both = Loggers(["bad", "good", "bad"], tmp_path, CONFIG)
    both.begin([])
    for record in records:
        both.record(record)
    both.close()
    assert good.taken == [record["step"] for record in records] and good.closed
    assert len(bad.taken) == (5 if trouble == "close" else 0) and not bad.closed
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("localpipe warning: logger bad failed (OSError: no space left); the run goes on without it")


@pytest.mark.parametrize("trouble", ["open", "record", "close"])
def test_a_logger_that_hangs_is_dropped_with_one_line(
    trouble: str,
    records: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    release = threading.Event()
    bad, good = Fake(trouble, lambda: release.wait(30)), Fake("", fail)
    monkeypatch.setattr(loggers, "OPENERS", {"bad": bad.opened, "good": good.opened})
    monkeypatch.setattr(loggers, "CLOSE_S", 0.3)
    both = Loggers(["bad", "good"], tmp_path, CONFIG)
    both.begin([])
    for record in records:
        both.record(record)
    both.close()
    assert not release.is_set() and good.taken == [record["step"] for record in records]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("localpipe warning: logger bad did not end in time")
    release.set()


def test_a_logger_that_has_hung_for_long_is_dropped_while_the_run_goes_on(
    records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release, reached = threading.Event(), threading.Event()
    bad = Fake("record", lambda: (reached.set(), release.wait(30)))
    monkeypatch.setattr(loggers, "OPENERS", {"bad": bad.opened})
    monkeypatch.setattr(loggers, "HANG_S", 0.0)
    one = Loggers(["bad"], tmp_path, CONFIG)
    one.begin([])
    one.record(records[0])
    assert reached.wait(30)
    one.record(records[1])
    one.record(records[2])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("localpipe warning: logger bad has not answered for 0 s")
    release.set()
    one.close()
    assert len(bad.taken) <= 1  # what came after it was dropped is not for it


def test_names_are_checked_and_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="log.to = 'tensorbord' is not known; did you mean 'tensorboard'?"):
        load_config(assignments=['log.to=["tensorbord"]'])
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    config = load_config(assignments=['log.to=["tensorboard", "wandb"]'])
    with pytest.raises(ConfigError, match=r"the package wandb is not installed; run: pip install localpipe\[wandb\]"):
        refuse_missing_loggers(config)
    refuse_missing_loggers(load_config(assignments=['log.to=["tensorboard"]']))


def test_loggers_do_not_change_what_a_run_is() -> None:
    assert load_config(assignments=['log.to=["wandb"]']).fingerprint() == load_config().fingerprint()
