"""``localpipe compare``: exit codes, and what is refused before anything is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.cli.main import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "localpipe: run 'none': no such directory\n"),
        (["none", "--json", "far/c.json"], "localpipe: 'far/c.json': there is no directory 'far'; make it, or choose"),
        (["none", "--output", "far/c.png"], "localpipe: 'far/c.png': there is no directory 'far'; make it, or choose"),
    ],
)
def test_what_cannot_work_is_refused_on_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["localpipe", "compare", *words])
    assert main() == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(message) and captured.err.count("\n") == 1
