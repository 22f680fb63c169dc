"""``localpipe COMMAND``, ``python -m pipeline COMMAND`` and ``python launch/COMMAND.py`` are one command line."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from pipeline import __version__, load_config, to_toml
from pipeline.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]


def localpipe(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of ``localpipe WORDS``, in this process."""
    monkeypatch.setattr(sys, "argv", ["localpipe", *words])
    return main()


def test_launch_has_a_file_for_every_command() -> None:
    assert sorted(path.stem for path in (ROOT / "launch").glob("*.py")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_take_the_same_arguments(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        localpipe(monkeypatch, name, "--help")
    installed = capsys.readouterr().out
    script = ROOT / "launch" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    clone = capsys.readouterr().out
    assert installed.startswith(f"usage: localpipe {name} ") and clone.startswith(f"usage: {name}.py ")
    assert installed.partition("\n\n")[2] == clone.partition("\n\n")[2]


def test_a_command_does_what_its_words_say(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert localpipe(monkeypatch, "train", "--print-config") == 0
    assert capfdbinary.readouterr().out.decode() == to_toml(load_config(), comments=True)
    assert localpipe(monkeypatch, "train", "--set", "method.name=xx") == 2
    assert capfdbinary.readouterr().err.startswith(b"localpipe: method.name = 'xx'")


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        localpipe(monkeypatch, "--version")
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("words", [[], ["trian"]])
def test_a_word_that_is_no_command_lists_them(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        localpipe(monkeypatch, *words)
    assert "COMMAND" in capsys.readouterr().err
