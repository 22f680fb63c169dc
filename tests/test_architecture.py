"""The shape of the code: imports point one way, ruff and mypy are clean, files stay readable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipeline", "launch", "benchmarks", "docker")
# From the bottom to the top: a file imports only from its own room and from those before it.
ROOMS = ["base", "models", "local", "ranks", "edges", "stage", "data", "plan", "store", "doctor", "report", "run"]
ROOMS += ["cli"]
LEVELS = [*ROOMS[:-1], "__init__", "cli", "__main__"]  # the command line stands on the public interface


def room(path: Path) -> str:
    """The folder of pipeline/ that a file is in."""
    parts = path.relative_to(ROOT / "pipeline").parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, our own as ``pipeline.X``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "pipeline":
                found |= {f"pipeline.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def attributes(path: Path, module: str) -> set[str]:
    """What a file uses of a module that it imports as a whole: ``train`` of ``pipeline.train(config)``."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == module}


def test_every_file_is_in_a_room() -> None:
    assert {room(path) for path in (ROOT / "pipeline").rglob("*.py")} == set(LEVELS)


def test_every_room_says_what_it_is_for() -> None:
    for name in ROOMS:
        assert ast.get_docstring(ast.parse((ROOT / "pipeline" / name / "__init__.py").read_text())), name


def test_imports_point_downwards_only() -> None:
    level = {name: index for index, name in enumerate(LEVELS)}
    for path in (ROOT / "pipeline").rglob("*.py"):
        mine = room(path)
        for name in imports(path):
            if name.startswith("pipeline."):
                other = name.split(".")[1]
                assert other == mine or level[other] < level[mine], f"{path.name} imports {name}"
            assert name.split(".")[0] not in ("launch", "benchmarks", "tests"), f"{path.name} imports {name}"


def test_benchmarks_and_the_command_line_use_the_public_interface_only() -> None:
    public = {f"pipeline.{name}" for name in __import__("pipeline").__all__}
    for folder in ("benchmarks", "pipeline/cli"):
        for path in (ROOT / folder).rglob("*.py"):
            own = {name for name in imports(path) if name.split(".")[0] == "pipeline"} - {"pipeline"}
            own |= {f"pipeline.{name}" for name in attributes(path, "pipeline") if "pipeline" in imports(path)}
            own = {name for name in own if folder == "benchmarks" or not name.startswith("pipeline.cli")}
            assert own <= public, (path, own - public)


def test_launch_parses_arguments_with_the_parsers_of_the_package_and_does_nothing_else() -> None:
    for path in (ROOT / "launch").rglob("*.py"):
        assert imports(path) == {"__future__", "sys", "pipeline.cli", "pipeline.cli.main"}, path
        assert len(path.read_text().splitlines()) < 20, path


def test_files_stay_readable() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 450, path


def test_the_training_step_of_a_rank_fits_on_one_screen() -> None:
    tree = ast.parse((ROOT / "pipeline" / "stage" / "stage.py").read_text())
    (step,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "train_step"]
    assert step.end_lineno is not None and step.end_lineno - step.lineno < 40
    called = {node.func.attr for node in ast.walk(step) if isinstance(node, ast.Call) and hasattr(node.func, "attr")}
    assert {"forward", "cascade", "relay", "independent", "final", "backward"} <= called


def test_ruff_is_clean() -> None:
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--config", ".ci/ruff.toml", "--no-cache", "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_mypy_is_clean(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", "setup.cfg", "--cache-dir", str(tmp_path), *FOLDERS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_only_declared_packages_are_imported() -> None:
    declared = {"torch", "torchvision", "numpy", "rich", "tomlkit", "PIL", "matplotlib", "safetensors", "wandb"}
    declared |= {"pipeline", "timm", "sklearn"}
    declared |= {path.stem for path in (ROOT / "benchmarks").glob("*.py")}  # scripts and what they share
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - declared
            assert not foreign, (path, foreign)


def test_what_is_cited_is_in_this_repository() -> None:
    """Files by their path, modules by their name; no section of a document that nobody else has ("NOTES 4.3").

    A name in capitals (``results/NAME.md``) is one that the user chooses.
    """
    folders = [ROOT / name for name in ("pipeline", "launch", "benchmarks", "tests")]
    listed = [path for folder in folders for pattern in ("*.py", "*.toml") for path in folder.rglob(pattern)]
    listed += [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.c*f*")]
    for file in listed:
        text = file.read_text(encoding="utf-8")
        for path in re.findall(r"(?<![\w/.<-])(?:pipeline|launch|benchmarks|tests|docs)/[\w./-]*\w(?!\w|\\)", text):
            assert (ROOT / path).exists() or Path(path).stem.isupper(), f"{file}: {path}"
        for name in re.findall(r"\b[A-Z]{3,}\.md\b", text):
            assert (ROOT / name).is_file() or name in ("FILE.md", "NAME.md"), f"{file}: {name}"
        for inside, module in re.findall(r"\bpipeline\.(\w+)\.(\w+)", text):
            if inside in ROOMS:
                place = ROOT / "pipeline" / inside
                known = (place / f"{module}.py").is_file() or module in (place / "__init__.py").read_text()
                assert known, f"{file}: pipeline.{inside}.{module}"
        section = re.search(r"\b[A-Z]{5,}(\.md)? \d+(\.\d+)?\b", text)
        assert section is None or file == Path(__file__), f"{file}: {section}"


def test_the_root_holds_what_belongs_there() -> None:
    files = {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "CITATION.cff", "CHANGELOG.md"}
    folders = {"pipeline", "launch", "benchmarks", "tests", "docs", "docker"}
    command = ["git", "ls-tree", "--name-only", "HEAD"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    assert {name for name in listed.stdout.split() if not name.startswith(".")} <= files | folders
