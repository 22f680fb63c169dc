"""The shape of the code: imports point one way, ruff is clean, files stay readable, no private paths are committed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom to the top: a file imports only from layers before its own.
LAYERS = [
    {"errors", "version"},
    {"attempt", "forks", "heartbeat", "patience", "process", "timeline"},
    {"config", "losses", "layers", "upsampling", "wire", "failure", "data", "report", "backbones"},
    {"heads", "hierarchy", "numerics", "optimiser", "partition", "transport", "runtime", "torchvision_backbones"},
    {"methods", "replay", "schedule", "weights"},
    {"compilation", "connect", "recorder", "simulate"},
    {"cost_profile", "local_module"},
    {"assembly", "stage"},
    {"cost", "free_stage", "module_state", "profiling", "sources", "telemetry"},
    {"checkpoint", "conductor"},
    {"evaluation", "exporting", "memory_error", "placement", "planning", "preparation", "resume", "saver", "tracing"},
    {"loop"},
    {"trainer"},
    {"__init__"},
]


def unit(path: Path) -> str:
    """The file below pipeline/, or the folder for files of a sub-package."""
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


def test_every_file_has_a_layer() -> None:
    files = {unit(path) for path in (ROOT / "pipeline").rglob("*.py")}
    assert files == set().union(*LAYERS)


def test_imports_point_downwards_only() -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    for path in (ROOT / "pipeline").rglob("*.py"):
        mine = unit(path)
        for name in imports(path):
            if name.startswith("pipeline."):
                other = name.split(".")[1]
                assert other == mine or level[other] < level[mine], f"{path.name} imports {name}"
            assert name.split(".")[0] not in ("launch", "benchmarks", "tests"), f"{path.name} imports {name}"


def test_launch_and_benchmarks_use_the_public_interface_only() -> None:
    for folder in ("launch", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            own = {name for name in imports(path) if name.split(".")[0] == "pipeline"}
            public = {f"pipeline.{name}" for name in __import__("pipeline").__all__}
            assert own <= public, (path, own - public)


def test_files_stay_readable() -> None:
    for folder in ("pipeline", "launch", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 450, path


def test_ruff_is_clean() -> None:
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--config", ".ci/ruff.toml", "--no-cache", "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_only_declared_packages_are_imported() -> None:
    declared = {"torch", "torchvision", "numpy", "rich", "PIL", "matplotlib", "safetensors", "pipeline"}
    declared |= {path.stem for path in (ROOT / "benchmarks").glob("*.py")}  # scripts and what they share
    for folder in ("pipeline", "launch", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - declared
            assert not foreign, (path, foreign)
