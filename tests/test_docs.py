"""README and docs/: every command in them is run, every file, function and heading that they name exists.

A block of bash is a list of commands, and so is what stands in backticks and begins with ``python`` or ``torchrun``:

    python3 -m venv ...                the set-up; .ci/run and test_learning.py run it, test_readme.py compares the text
    torchrun ... launch/train.py       on docs/checkpoints.md, for two steps; elsewhere as far as its configuration
    torchrun ... mine.py               the example of README; test_readme.py runs it
    python launch/..., learning_curve  in this process, on the run of docs/checkpoints.md; plans for two images a step,
                                       of a smaller network where they name no recipe; those of README are cut by
                                       cost and compare the forms of heads, the others have one form
    python benchmarks/...              by test_benchmarks.py with --quick, by test_evidence.py with little data

A block below ``<!-- not run: why -->`` is not run. Examples in Python are run, one after another.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import runpy
import shlex
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest
from helpers_spawn import run_ranks
from helpers_torchrun import run_agents
from PIL import Image
from test_architecture import ROOMS

from pipeline import load_config, train

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINED = ROOT / "docs" / "checkpoints.md"
SMALL = ["--set", "data.batch_size=16", "--set", "model.name=resnet20", "--set", "model.cuts=even"]
SMALL += ["--set", "patches.at_once=4", "--set", "partition.kind=count", "--set", "log.curve=false"]  # no counts


def commands(page: Path) -> list[str]:
    """What a page tells its reader to run, in order, and not twice."""
    text = re.sub(r"<!-- not run: [^>]*\w.*?-->\n```bash\n.*?```", "", page.read_text(), flags=re.DOTALL)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", prose)
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()))


def headings(page: Path) -> set[str]:
    """The anchors of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


EVERY = [(page, command) for page in PAGES for command in commands(page)]
HERE = [
    (page, command)
    for page, command in EVERY
    if not command.startswith(("python3 -m venv", "python benchmarks/")) or "learning_curve.py " in command
    if not (page == TRAINED and command.startswith("torchrun")) and not command.endswith(" mine.py")
]


def launch(rank: int, folder: str, arguments: list[str]) -> None:
    """launch/train.py in a worker of torchrun."""
    os.chdir(folder)
    sys.argv = ["launch/train.py", *arguments]
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader works: his own recipe, a profile, and the run of docs/checkpoints.md."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "mine.toml").write_text("[train]\nepochs = 3\n")
    training = [command for command in commands(TRAINED) if command.startswith("torchrun")]
    for steps, command in enumerate(training, start=2):
        pattern = r"torchrun --nproc_per_node=(\d+)(?: --max-restarts=(\d+))? launch/train\.py (.*)"
        ranks, restarts, script = re.fullmatch(pattern, command).groups()
        arguments = [*shlex.split(script), *SMALL, "--set", f"train.max_steps={steps}"]
        (done,) = run_agents(launch, [int(ranks)], str(folder), arguments, restarts=int(restarts or 0))
        assert done.exit_code == 0, done.stderr[-3000:]
        assert ("resumed from" in done.stderr) == (steps > 2)
    assert len(training) == 2
    return folder


def run_here(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of launch/ or benchmarks/ as ``__main__``; it must end well."""
    script, *arguments = shlex.split(command)[1:]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, command


@pytest.mark.slow
@pytest.mark.parametrize("page, command", HERE, ids=[f"{page.stem}: {command}" for page, command in HERE])
def test_commands_run(
    page: Path, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    if command.startswith("torchrun"):
        launcher, script = re.fullmatch(r"torchrun (.*) launch/train\.py ?(.*)", command).groups()
        assert re.fullmatch(r"--nproc_per_node=\d+", launcher)
        command = f"python launch/train.py {script} --print-config"
    elif "launch/plan.py" in command:
        command += f" --set data.batch_size={4 if 'replicas' in command else 2}"  # two images for each, at least
        command += "" if "--recipe" in command else " --set model.name=resnet20"
        command += "" if page.name == "README.md" else " --set patches.grid=1 --set model.cuts=even"
    run_here(command, monkeypatch)
    printed = capfd.readouterr().out
    assert printed or "learning_curve" in command


def test_what_is_not_run_says_why() -> None:
    for page in PAGES:
        for reason in re.findall(r"<!--(.*?)-->", page.read_text()):
            assert re.fullmatch(r" not run: needs .+ ", reason), page


def test_commands_that_run_elsewhere_are_tested_there() -> None:
    tested = "".join((ROOT / "tests" / f"test_{name}.py").read_text() for name in ("benchmarks", "evidence"))
    for page, command in EVERY:
        if (page, command) in HERE or (page == TRAINED and command.startswith("torchrun")):
            continue
        benchmark = re.fullmatch(r"python benchmarks/(\w+)\.py", command)
        named = benchmark and re.search(rf"\b{benchmark[1]}(\"|=)", tested)
        assert named or page.name == "README.md", f"{page.name}: {command}"


TEXTS = [page.read_text() for page in PAGES if page.name != "README.md"]  # its examples: test_readme.py
EXAMPLES = [block for text in TEXTS for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
OPTIONAL = {match[1]: block for block in EXAMPLES if (match := re.match(r"# pip install (\w+)\n", block))}
"""Package -> the example that needs it."""


@pytest.mark.slow
def test_examples_in_python_run(tmp_path: Path) -> None:
    examples = [example for example in EXAMPLES if example not in OPTIONAL.values()]
    assert examples
    (done,) = run_ranks(run_examples, 1, str(tmp_path), examples, timeout_s=120.0)
    assert done.exit_code == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "runs").glob("*/model.pt"))) == len(examples)


@pytest.mark.parametrize("package", OPTIONAL)
def test_examples_with_other_packages_run_where_these_are(package: str, tmp_path: Path) -> None:
    pytest.importorskip(package, reason=f"the example with {package} needs it: pip install {package}")
    (done,) = run_ranks(run_examples, 1, str(tmp_path), [OPTIONAL[package]], timeout_s=120.0)
    assert done.exit_code == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / package / "model.pt").is_file()


def test_examples_are_short() -> None:
    assert {"datasets", "webdataset"} == OPTIONAL.keys()
    for example in EXAMPLES:
        most = 15 if example in OPTIONAL.values() else 30
        assert len(example.splitlines()) <= most, example


def run_examples(rank: int, folder: str, examples: list[str]) -> None:
    """One after another, in a process of their own: what they register stays registered."""
    os.chdir(folder)
    for number, example in enumerate(examples):
        Path(f"{number}.py").write_text(example)
        runpy.run_path(f"{number}.py", run_name="__main__")


def test_options_in_the_text_load() -> None:
    for page in PAGES:
        for assignment in re.findall(r"`--set ([a-z_]+\.[a-z_]+=[\w.-]+)`", page.read_text()):
            load_config(assignments=[assignment])


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.is_file(), f"{page.name}: {target}"
            assert not anchor or anchor in headings(file), f"{page.name}: {target}"


def test_every_page_is_in_the_table_of_readme() -> None:
    readme = PAGES[0].read_text()
    assert len(readme.splitlines()) <= 120
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme


def way_of_an_image() -> list[tuple[str, str]]:
    """(function, file) of the table below the drawing."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    (drawing, *_) = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    rows = re.findall(r"^\| (\d+) \| `([\w.]+)` \| `([\w/]+\.py)` \|", text, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
    assert {int(number) for number in re.findall(r"\((\d+)\)", drawing)} == {int(number) for number, _, _ in rows}
    return [(name, file) for _, name, file in rows]


def test_the_functions_on_the_way_of_an_image_exist() -> None:
    assert len(way_of_an_image()) <= 12
    for name, file in way_of_an_image():
        scope = ast.parse((ROOT / file).read_text()).body
        for part in name.split("."):
            found = [node for node in scope if getattr(node, "name", "") == part]
            assert len(found) == 1, f"{file} has no {name}"
            scope = getattr(found[0], "body", [])


def called_in_training(rank: int, folder: str, wanted: list[tuple[str, str]]) -> list[str]:
    """Which of the functions a rank calls in one step on images of files, in the order of their first call."""
    called: dict[str, None] = {}
    codes = {(name, str(ROOT / file)) for name, file in wanted}

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and (frame.f_code.co_qualname, frame.f_code.co_filename) in codes:
            called[frame.f_code.co_qualname] = None

    threading.setprofile(look)  # of threads that are still to begin
    sys.setprofile(look)
    settings = ["data.name=folder", f"data.root={folder}/images", "data.batch_size=2", "data.cache_gib=0"]
    settings += ["model.name=resnet20", "model.modules=3", "model.cuts=even", "patches.at_once=4", "log.curve=false"]
    settings += ["partition.kind=given", "partition.stages=[1, 2]"]
    config = load_config(assignments=[*settings, "train.max_steps=1", "checkpoint.every_epochs=0"])
    train(config, run_dir=f"{folder}/run", quiet=True)
    sys.setprofile(None)
    return list(called)


def test_an_image_goes_the_way_that_is_drawn(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, label in enumerate("abab"):
            file = tmp_path / "images" / split / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(file)
    way = way_of_an_image()
    first, second = run_ranks(called_in_training, 2, str(tmp_path), way)
    assert first.exit_code == second.exit_code == 0, first.stderr + second.stderr
    assert set(first.value) | set(second.value) == {name for name, _ in way}
    begin = [name for name, _ in way[:7]]
    assert [name for name in first.value if name in begin] == begin
    assert "LocalModule.relay" not in first.value and "DataInlet.next" not in second.value


def test_the_rooms_are_those_of_the_code_in_their_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert re.findall(r"^\| `pipeline/(\w+)/` \| .*\? \|$", text, re.MULTILINE) == ROOMS
