"""docs/configuration.md: its commands run, its examples load, its table is the one that is written."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline import load_config

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python launch/train\.py --\S.*?(?=\s{2}|`|\n)", PAGE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_run(
    command: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert len(COMMANDS) == 4
    script, *arguments = shlex.split(command)[1:]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    printed, said = capfdbinary.readouterr()
    assert ended.value.code == 0 and printed
    assert said.decode() in PAGE
    assert bool(said) == ("model.modules=4" in command)


def test_examples_of_the_page_load(tmp_path: Path) -> None:
    mine, row = blocks("toml")
    (tmp_path / "my-machine.toml").write_text("[runtime]\nthreads = 2\n")
    (tmp_path / "mine.toml").write_text(mine)
    config = load_config(file=tmp_path / "mine.toml", say=lambda line: None)
    assert (config.model.modules, config.train.epochs, config.runtime.threads) == (4, 100, 2)
    papers = tomllib.loads((ROOT / "pipeline" / "recipes" / "papers.toml").read_text())
    ((name, line),) = tomllib.loads(row).items()
    assert papers["hpff-1"]["recipes"][name] == line


def test_the_table_of_all_keys_is_the_one_that_is_written() -> None:
    command = [sys.executable, "-c", "import pipeline; print(pipeline.keys_markdown())"]  # with no method of a test
    table = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert PAGE.endswith(f"\n{table}"), "write it again: python launch/train.py --list-keys"
