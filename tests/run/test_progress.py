"""Progress within an epoch: other ranks are asked for their numbers only where a line will show them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import Batches, network, tiny_config

from pipeline import LoaderData, train
from pipeline.report.console import output_console
from pipeline.report.view import PlainView
from pipeline.run import loop
from pipeline.run.telemetry import Telemetry

STEPS = 40


class Longer(Batches):
    """STEPS batches."""

    def __len__(self) -> int:
        return STEPS

    def __iter__(self):
        for _ in range(STEPS // len(Batches())):
            yield from super().__iter__()


@pytest.mark.parametrize(("interval_s", "lines"), [(60.0, 0), (0.0, 10)])
def test_live_numbers_are_asked_for_as_often_as_a_line_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], interval_s: float, lines: int
) -> None:
    asked = []
    live = Telemetry.live
    monkeypatch.setattr(Telemetry, "live", lambda telemetry: asked.append(1) or live(telemetry))
    monkeypatch.setattr(loop, "SHOW_S", 0.0)
    monkeypatch.setattr(
        "pipeline.run.train.open_view", lambda quiet: PlainView(output_console(), interval_s=interval_s)
    )
    config = tiny_config(modules=2, train={"epochs": 1})
    train(config, network=network(), data=LoaderData(Longer(), Batches()), run_dir=tmp_path)
    printed = [line for line in capsys.readouterr().out.splitlines() if "train  batch" in line]
    assert (len(asked), len(printed)) == (lines, lines)
