"""A key that the user sets replaces an inherited one that it makes meaningless, and says so; his own are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import ConfigError, load_config
from pipeline.base.overrides import RULES
from pipeline.base.validation import value_of

CASES = [
    (
        "cifar10-resnet32-k16-dgl-hpff", "", "model.modules=4", {"model.cuts": "auto"},
        ["model.cuts = 'hpff' gives way to 'auto': it has 8, 16 for resnet32, and model.modules = 4 is set"],
    ),
    (
        "cifar10-resnet32-k16-dgl", "", "model.name=resnet56", {"model.cuts": "auto"},
        ["model.cuts = 'hpff' gives way to 'auto': it has no K for resnet56, and model.name = 'resnet56' is set"],
    ),
    (
        None, "[model]\nname = 'resnet18'\nmodules = 4\n", 'model.cuts=["layer1", "layer2.1"]', {"model.modules": 3},
        ["model.modules = 4 gives way to 3: one local module begins at every cut, and model.cuts = "],
    ),
    (
        None, "[hierarchy]\ncascade_span = 4\n", "model.group=2", {"hierarchy.cascade_span": 2},
        ["hierarchy.cascade_span = 4 gives way to 2: the largest span is K, and model.group = 2 is set"],
    ),
    (
        None, "[model]\nmodules = 6\ngroup = [2, 4]\n", "model.modules=5", {"model.group": 1},
        ["model.group = [2, 4] gives way to 1: the cut makes 5 local modules, and model.modules = 5 is set"],
    ),
    (
        None, "[hierarchy]\ncascade_span = 4\n", "model.modules=3", {"hierarchy.cascade_span": 3},
        ["hierarchy.cascade_span = 4 gives way to 3: the largest span is K, and model.modules = 3 is set"],
    ),
    (
        None, "[hierarchy]\ncascade_span = 2\n", "hierarchy.variant=deepsup", {"hierarchy.cascade_span": 4},
        ["hierarchy.cascade_span = 2 gives way to 4: in deepsup every loss flows through the whole network, and "],
    ),
    (
        "cifar10-resnet32-k8-infopro-hpff", "", "method.name=dgl", {"method.head": ""},
        ["method.head = '2c2f' gives way to '': it is no head of dgl, and method.name = 'dgl' is set"],
    ),
    (
        None, '[schedule]\nkind = "async"\ndelay = 3\n', "schedule.kind=exact", {"schedule.delay": 1},
        ["schedule.delay = 3 gives way to 1: it belongs to 'async', and schedule.kind = 'exact' is set"],
    ),
    (
        None, '[schedule]\nkind = "free"\nring = 2\nmax_uses = 9\n', "schedule.kind=async",
        {"schedule.ring": 4, "schedule.max_uses": 0},
        [
            "schedule.ring = 2 gives way to 4: it belongs to 'free', and schedule.kind = 'async' is set",
            "schedule.max_uses = 9 gives way to 0: it belongs to 'free', and schedule.kind = 'async' is set",
        ],
    ),
    (
        None, '[schedule]\nkind = "async"\n[optim]\nerror_feedback = true\n', "schedule.kind=exact",
        {"optim.error_feedback": False},
        ["optim.error_feedback = True gives way to False: it belongs to 'async', and schedule.kind = 'exact' is set"],
    ),
    (
        None, "[schedule]\nmicro_batches = 2\n", "schedule.kind=free", {"schedule.micro_batches": 1},
        ["schedule.micro_batches = 2 gives way to 1: the replay ring holds whole batches, and schedule.kind = 'free'"],
    ),
    (
        None, '[partition]\nkind = "given"\nstages = [2, 2]\n', "partition.kind=measured", {"partition.stages": ()},
        ["partition.stages = [2, 2] gives way to []: stages belong to kind 'given', and partition.kind = 'measured'"],
    ),
    (
        None, '[partition]\nkind = "given"\nstages = [2, 2]\n', "model.modules=5",
        {"partition.stages": (), "partition.kind": "auto"},
        ["partition.stages = [2, 2] gives way to []: it holds 4 modules, and model.modules = 5", "to 'auto'"],
    ),
    (
        None, "", "partition.stages=[3,1]", {"partition.kind": "given"},
        ["partition.kind = 'auto' gives way to 'given': stages belong to kind 'given', and partition.stages = [3, 1]"],
    ),
    (
        None, "", "optim.momentum=0", {"optim.nesterov": False},
        ["optim.nesterov = True gives way to False: it needs momentum, and optim.momentum = 0.0 is set"],
    ),
]  # fmt: skip


def load(tmp_path: Path, recipe: str | None, file: str, *assignments: str) -> tuple[object, list[str]]:
    path = tmp_path / "mine.toml"
    path.write_text(file)
    lines: list[str] = []
    return load_config(recipe, path if file or recipe is None else None, assignments, say=lines.append), lines


@pytest.mark.parametrize(("recipe", "file", "assignment", "values", "expected"), CASES)
def test_an_inherited_key_that_has_lost_its_meaning_gives_way_and_a_line_says_so(
    tmp_path: Path, recipe: str | None, file: str, assignment: str, values: dict[str, object], expected: list[str]
) -> None:
    config, lines = load(tmp_path, recipe, file, assignment)
    assert {key: value_of(config, key) for key in values} == values
    assert len(lines) == len(expected)
    assert all(words in line for words, line in zip(expected, lines, strict=True)), lines


def test_every_rule_has_a_case() -> None:
    assert {rule.inherited for rule in RULES} == {key for case in CASES for key in case[3]}


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["model.modules=3", "hierarchy.cascade_span=4"], "hierarchy.cascade_span = 4 is larger"),
        (["schedule.kind=exact", "schedule.delay=3"], "schedule.delay = 3"),
        (["schedule.kind=free", "schedule.micro_batches=2", "hierarchy.cascade_span=1"], "schedule.micro_batches = 2"),
        (["partition.kind=measured", "partition.stages=[2,2]"], "partition.stages = [2, 2]"),
        (["schedule.kind=free"], "schedule.kind = 'free' with hierarchy.cascade_span = 2"),  # another method
    ],
)
def test_what_the_user_gave_himself_is_refused(assignments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(assignments=assignments)
    assert words in str(caught.value)


def test_a_file_gives_way_to_the_command_line_and_a_base_to_its_file(tmp_path: Path) -> None:
    base = 'base = "cifar10-resnet32-k16-dgl-hpff"\n'
    config, lines = load(tmp_path, None, f"{base}[model]\nmodules = 4\n")
    assert (config.model.cuts, len(lines)) == ("auto", 1)
    _, lines = load(tmp_path, None, '[model]\nmodules = 8\ncuts = "hpff"\n', "model.modules=4")
    assert len(lines) == 1


def test_what_keeps_its_meaning_stays(tmp_path: Path) -> None:
    config, lines = load(tmp_path, "cifar10-resnet32-k16-infopro-hpff", "", "model.modules=8", "method.name=greedy")
    assert (config.model.cuts, config.method.head, lines) == ("hpff", "2c2f", [])


def test_one_rank_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        load_config("cifar10-resnet32-k16-dgl-hpff", assignments=["model.modules=4"])
    printed = capsys.readouterr().err
    assert printed.startswith("localpipe: model.cuts = 'hpff' gives way") and printed.count("\n") == 1
