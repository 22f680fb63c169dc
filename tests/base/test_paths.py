"""Paths that are no ASCII, where the locale is: ``LC_ALL=C`` without Python's UTF-8 mode, through real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline import load_config, to_toml
from pipeline.base.paths import is_text, path_of, text_of

ROOT = Path(__file__).parent.parent.parent
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
JOB = (
    "model.name=resnet20 model.modules=2 method.name=dgl data.name=folder data.batch_size=4 train.epochs=1 "
    "model.cuts=even patches.at_once=4 log.curve=false runtime.device=cpu runtime.threads=1"
)
NAME = "bïlder🎉"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("test", 2)):
        for index in range(count):
            path = tmp_path / NAME / split / ("ä", "b")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / NAME


def launch(folder: Path, *arguments: str | bytes, ranks: int = 0) -> subprocess.CompletedProcess[bytes]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    settings = [word for assignment in JOB.split() for word in ("--set", assignment)]
    command = [sys.executable, *torchrun, str(ROOT / "launch" / "train.py"), *settings, *arguments]
    return subprocess.run(command, cwd=folder, env=ASCII, capture_output=True, timeout=120)


@pytest.mark.slow
def test_a_run_with_such_paths_is_trained_and_written(tmp_path: Path, data: Path) -> None:
    paths = ("--set", f"data.root={data}", "--run-dir", "läuf🎉")
    begun = launch(tmp_path, *paths, ranks=2)
    assert begun.returncode == 0, begun.stderr.decode()
    assert load_config(file=tmp_path / "läuf🎉" / "config.toml").data.root == str(data)
    assert "run directory" in begun.stdout.decode() and (tmp_path / "läuf🎉" / "model.pt").is_file()


@pytest.mark.slow
def test_such_a_configuration_is_printed_and_bytes_that_are_no_text_are_refused_on_one_line(tmp_path: Path) -> None:
    asked: list[tuple[str | bytes, ...]] = [
        ("--print-config", "--set", f"data.root={NAME}"),
        ("--set", b"data.root=a\xff"),
        ("--set", "data.root=.", "--run-dir", b"r\xff"),
    ]
    with ThreadPoolExecutor() as pool:
        printed, *refused = pool.map(lambda arguments: launch(tmp_path, *arguments), asked)
    assert tomllib.loads(printed.stdout.decode())["data"]["root"] == NAME, printed.stderr
    words = ("data.root = 'a\\udcff' is not text in UTF-8", "run directory 'r\\udcff' is not text")
    for result, word in zip(refused, words, strict=True):
        message = result.stderr.decode()
        assert result.returncode != 0 and message.count("\n") == 1 and word in message, message
    assert not list(tmp_path.iterdir())


def test_text_and_bytes_of_a_path_are_each_other_s_reverse() -> None:
    for name in (NAME, "a b", "\u3000"):
        surrogates = name.encode().decode("ascii", "surrogateescape")  # as sys.argv has it under an ASCII locale
        assert text_of(surrogates) == name == text_of(name)
        assert os.fsencode(path_of(name)) == name.encode()
    assert text_of("\udcff") == "\udcff" and not is_text("\udcff")


def test_any_text_is_written_and_read(tmp_path: Path) -> None:
    for root in (NAME, 'a"b', "a\\b", "a\nb", "a\u2028b", "#", "'''", "\x7f"):
        config = load_config(assignments=["data.name=folder", f"data.root={root}"])
        (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
        assert load_config(file=tmp_path / "config.toml") == config
        assert config.data.root == root
