"""The README's commands and example are the ones that run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import __version__, load_config, recipe_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_ci_runs_exactly_the_readme_test_command() -> None:
    command = next(block.strip() for block in code_blocks("bash") if "pytest" in block)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert command.startswith("python3 -m venv") and command in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_first_command_installs_and_starts_the_default_job() -> None:
    """The job itself runs in test_learning.py; here: the same install, the same script, no argument."""
    command = code_blocks("bash")[0].strip()
    assert re.fullmatch(
        r"python3 -m venv \.venv && \.venv/bin/pip install -q \. && "
        r"\.venv/bin/torchrun --nproc_per_node=4 launch/train\.py",
        command,
    )


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[{re.escape(__version__)}\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_usual_hosts_run_what_ci_runs() -> None:
    assert "      - run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook.split()[:3] for hook in hooks] == [["python", "-m", "ruff"], ["python", "-m", "mypy"]]


@pytest.mark.slow
def test_the_installed_package_is_complete(tmp_path: Path) -> None:
    """What ``pip install .`` installs: code, recipes and the embedded data with its attribution, and no tests."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = tmp_path.glob("localpipe-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"pipeline/data/digits.npz", "pipeline/data/digits_attribution.txt", "pipeline/stage/stage.py"} <= names
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline" / "recipes").rglob("*.toml")}
    assert len(recipes) > 15 and recipes <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "launch/"))]


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code_blocks("python")[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "mine.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Local modules" in result.stdout
    _, *last = result.stdout[result.stdout.index("run directory") :].splitlines()
    printed = "".join(last)  # ranks print at the same time, so two numbers may share a line
    one = printed[: len(printed) // 3]
    assert float(one) > 0 and printed == 3 * one, last  # every rank gets the summary


@pytest.mark.slow
def test_lists_and_prints(tmp_path: Path) -> None:
    asked = (["--list-recipes"], ["--print-config", "--set", "train.seed=5"], ["--recipe", "digit"])
    with ThreadPoolExecutor() as pool:
        listed, printed, wrong = pool.map(lambda arguments: launch_train(arguments, tmp_path), asked)
    assert [line.split()[0] for line in listed.stdout.splitlines()[: len(recipe_names())]] == recipe_names()
    (tmp_path / "again.toml").write_text(printed.stdout)
    assert load_config(file=tmp_path / "again.toml").train.seed == 5
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("localpipe: --recipe digit: no such recipe") and wrong.stderr.count("\n") == 1


def launch_train(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
