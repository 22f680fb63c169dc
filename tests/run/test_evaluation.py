"""A checkpoint tested in one process: what the run has reported, for every exit; and exits together, by definition."""

from __future__ import annotations

import io
import json
import runpy
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import Batches, network, tiny_blocks, tiny_config
from torch import Tensor, nn

from pipeline import Classification, ConfigError, Evaluation, LoaderData, evaluate, load_config, show_evaluation, train
from pipeline.local.task import ERROR
from pipeline.run.evaluation import count_exits
from pipeline.stage.inlet import Batch
from pipeline.store.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on the digits, with heads of both levels."""
    folder = tmp_path_factory.mktemp("run") / "resnet20"
    settings = ["model.name=resnet20", "model.modules=3", "hierarchy.cascade_span=2", "method.name=dgl"]
    settings += ["optim.warmup_epochs=0", "train.max_steps=4", "runtime.device=cpu"]
    settings += ["runtime.threads=1", "model.cuts=even", "log.curve=false"]
    train(load_config(assignments=settings), run_dir=folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network and loaders of one's own, K = 4, both levels, patches, two epochs."""
    folder = tmp_path_factory.mktemp("run") / "own"
    settings = tiny_config("infopro", "hpff", 2, 4, schedule={"micro_batches": 2}, train={"epochs": 2})
    train(settings, network=network(), data=LoaderData(Batches(), Batches()), run_dir=folder, quiet=True)
    return folder


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def by_exit(evaluation: Evaluation) -> dict[tuple[int, str], float]:
    return {(row.module, row.exit): row.error_pct for row in evaluation.rows}


def own_data() -> dict[str, Any]:
    return {"network": network(), "data": LoaderData(Batches(), Batches())}


def test_every_exit_has_the_error_that_the_run_has_reported(run: Path) -> None:
    evaluation = evaluate(run)
    summary, found = summary_of(run), by_exit(evaluation)
    assert evaluation.test_error_pct == summary["test_error_pct"]
    assert (evaluation.step, evaluation.epoch, evaluation.images) == (4, 1, 359)
    reported = {
        (head["index"], level): error for head in summary["heads"] for level, error in head["head_error_pct"].items()
    }
    assert {key: error for key, error in found.items() if key[1] not in ("prefix", "all")} == reported
    assert set(reported) == {(0, "independent"), (1, "independent"), (1, "cascade"), (2, "final")}
    assert len(set(reported.values())) > 1


def test_a_network_and_loaders_of_ones_own_can_be_given(own: Path) -> None:
    mine = own_data()
    evaluation = evaluate(own, **mine)
    assert evaluation.test_error_pct == summary_of(own)["test_error_pct"]
    saved = torch.load(own / "model.pt", weights_only=True)
    assert all(torch.equal(value, saved[key]) for key, value in mine["network"].state_dict().items())


class Exits:
    """Stands for a local module: fixed random class scores (400, 4) of its exits, which grow larger with the module."""

    def __init__(self, index: int, levels: list[str]) -> None:
        self.plan = types.SimpleNamespace(index=index)
        generator = torch.Generator().manual_seed(index)
        self.scores = {level: torch.randn(400, 4, generator=generator) * (1 + index) for level in levels}

    def evaluate(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return inputs, {level: scores[inputs["x"]] for level, scores in self.scores.items()}


def test_ensembles_are_weighted_means_of_class_probabilities() -> None:
    """Against the definition: exits of modules 0..m, weights 2^module / sum; and all exits, equal weights."""
    levels = [["independent"], ["cascade", "independent"], [], ["cascade"], ["final"]]
    modules = [Exits(index, names) for index, names in enumerate(levels)]
    labels = torch.arange(400) % 4
    batches = [Batch(x=rows, labels=labels[rows], image=None) for rows in torch.arange(400).split(150)]
    statistics, images = count_exits(modules, batches, Classification(4, (3, 8, 8)))
    assert images == 400

    def errors(last: int, base: float) -> int:
        terms = [(base**m.plan.index, s) for m in modules[: last + 1] for s in m.scores.values()]
        total = sum(weight for weight, _ in terms)
        mean = sum(weight / total * scores.double().softmax(dim=1) for weight, scores in terms)
        return int((mean.argmax(dim=1) != labels).sum())

    expected = {(m, "prefix"): errors(m, 2.0) for m in (0, 1, 3, 4)} | {(4, "all"): errors(4, 1.0)}
    expected |= {
        (m.plan.index, level): int((scores.argmax(dim=1) != labels).sum())
        for m in modules
        for level, scores in m.scores.items()
    }
    assert {key: int(wrong) for key, wrong in statistics.items()} == {
        (module, name, ERROR.name): wrong for (module, name), wrong in expected.items()
    }


def test_an_ensemble_of_one_exit_is_not_listed(own: Path) -> None:
    together = [key for key in by_exit(evaluate(own, **own_data())) if key[1] in ("prefix", "all")]
    assert together == [(1, "prefix"), (2, "prefix"), (3, "prefix"), (3, "all")]


def test_parameters_and_operations_grow_to_the_whole_network(run: Path) -> None:
    rows = evaluate(run).rows
    by_module = {row.module: (row.parameters, row.operations) for row in rows}
    assert by_module[0] < by_module[1] < by_module[2]
    assert by_module[2] == (272_474, 1.0)
    assert [row.module for row in rows] == sorted(row.module for row in rows)


@pytest.mark.parametrize(("method", "modules"), [("dgl", 1), ("infopro-contrast", 3)])
def test_without_heads_that_classify_there_is_only_the_classifier(tmp_path: Path, method: str, modules: int) -> None:
    settings = tiny_config(method, "plain", 1, modules, train={"epochs": 1})
    train(settings, **own_data(), run_dir=tmp_path, quiet=True)
    evaluation = evaluate(tmp_path, **own_data())
    assert list(by_exit(evaluation)) == [(modules - 1, "final")]
    assert evaluation.test_error_pct == summary_of(tmp_path)["test_error_pct"]


def test_a_late_run_is_tested_without_its_late_work(tmp_path: Path) -> None:
    """A checkpoint in the middle of an epoch of schedule `async` holds batches in flight."""
    settings = tiny_config(
        "dgl", "hpff", 2, 4, schedule={"kind": "async"}, train={"epochs": 1}, checkpoint={"every_steps": 3}
    )
    train(settings, **own_data(), run_dir=tmp_path, quiet=True)
    middle = tmp_path / "checkpoints" / "step-00000003"
    assert evaluate(middle, **own_data()).step == 3


# --- what may change --------------------------------------------------------------------------------------------------


def test_batches_and_precision_may_change(run: Path) -> None:
    before = evaluate(run)
    other = evaluate(run, ["data.batch_size=50", "precision.compute=fp64", "runtime.threads=2", "runtime.device=cpu"])
    assert other.images == before.images
    assert other.test_error_pct == pytest.approx(before.test_error_pct, abs=0.6)  # two images
    assert torch.get_num_threads() == 1  # of the caller


@pytest.mark.parametrize("key", ["model.modules", "train.seed", "runtime.deadline_s", "dat.root", "schedule.kind"])
def test_what_was_trained_may_not_change(run: Path, key: str) -> None:
    allowed = r"only data\.\*, precision\.\*, runtime\.device and runtime\.threads can be set"
    with pytest.raises(ConfigError, match=f"'{key}' is as the checkpoint was trained; {allowed}"):
        evaluate(run, [f"{key}=1"])


def test_wrong_values_and_names_are_refused_as_ever(run: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'data.root'"):
        evaluate(run, ["data.rot=here"])
    with pytest.raises(ConfigError, match="precision.compute = 'fp8' is not known"):
        evaluate(run, ["precision.compute=fp8"])


def folder_of_images(root: Path, classes: int, size: int) -> Path:
    from PIL import Image

    for split in ("train", "test"):
        for name in range(classes):
            (root / split / str(name)).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (size, size), (40 * name, 9, 9)).save(root / split / str(name) / f"{index}.png")
    return root


@pytest.mark.parametrize(
    ("classes", "size", "words"),
    [
        (3, 32, "'folder' has 3 classes, the checkpoint was trained for 10; set data.name and data.root"),
        (10, 16, r"'folder' has images of shape \(3, 16, 16\), the checkpoint was trained on \(3, 32, 32\)"),
    ],
)
def test_data_for_another_network_is_refused(run: Path, tmp_path: Path, classes: int, size: int, words: str) -> None:
    root = folder_of_images(tmp_path / "images", classes, size)
    with pytest.raises(ConfigError, match=words):
        evaluate(run, ["data.name=folder", f"data.root={root}", "data.batch_size=2"])


def test_other_images_of_the_same_classes_are_tested(run: Path, tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "images", 10, 32)
    evaluation = evaluate(run, ["data.name=folder", f"data.root={root}", "data.batch_size=4"])
    assert (evaluation.images, evaluation.data) == (20, "folder")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_only_one_process_evaluates(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes were started, but an evaluation is one"):
        evaluate(run)


def test_a_network_of_ones_own_must_be_given_and_be_the_one_that_was_trained(own: Path) -> None:
    mine = own_data()
    with pytest.raises(ConfigError, match=r"a network of your own, which no name can rebuild; call pipeline\.evaluate"):
        evaluate(own)
    with pytest.raises(ConfigError, match=r"loaders of your own; call pipeline\.evaluate"):
        evaluate(own, network=mine["network"])
    renamed = nn.Sequential(OrderedDict((f"my_{name}", block) for name, block in tiny_blocks().items()))
    with pytest.raises(ConfigError, match="has the local modules .*'stem'.* this network gives .*'my_stem'"):
        evaluate(own, network=renamed, data=mine["data"])
    other = tiny_blocks()
    other["stem"][0] = nn.Conv2d(3, 4, 5, 1, 2, bias=False)
    with pytest.raises(ConfigError, match="does not fit blocks.stem of local module 0; pass the network that was"):
        evaluate(own, network=nn.Sequential(other), data=mine["data"])


# --- the command line -------------------------------------------------------------------------------------------------


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run launch/evaluate.py in this process; its exit code."""
    script = Path(__file__).parents[2] / "launch" / "evaluate.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    return runpy.run_path(str(script))["main"]()


def test_the_command_line_prints_a_table_and_writes_the_numbers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(monkeypatch, run, "--json", tmp_path / "exits.json") == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "exits.json").read_text())
    assert document["test_error_pct"] == summary_of(run)["test_error_pct"]
    assert list(document) == [
        *("checkpoint", "step", "epoch", "network", "data", "images", "rows", "test_error_pct")
    ]
    assert list(document["rows"][0]) == ["module", "blocks", "exit", "error_pct", "parameters", "operations"]
    for row in document["rows"]:
        assert f"{row['error_pct']:.2f}" in printed
    for piece in ("independent", "cascade", "final", "prefix 0-2", "all, mean", "359 test images (digits)", "step 4"):
        assert piece in printed
    assert command_line(monkeypatch, run, "--json", tmp_path / "nowhere" / "exits.json") == 2
    assert "exits.json' cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 140])
def test_no_number_is_cut_off_on_a_narrow_screen(run: Path, width: int) -> None:
    out = io.StringIO()
    evaluation = evaluate(run)
    show_evaluation(evaluation, Console(file=out, width=width))
    _, heading, _, *rows = out.getvalue().splitlines()
    assert all(word in heading for word in ("module", "test error %", "operations %"))
    for line, row in zip(rows, evaluation.rows, strict=False):
        assert line.split()[-3:] == [f"{row.error_pct:.2f}", f"{row.parameters:,}", f"{100 * row.operations:.1f}"]
        assert len(line) <= width


def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_config("dgl", modules=2, train={"epochs": 1})
    train(settings, **own_data(), run_dir=tmp_path / "run", quiet=True)
    capsys.readouterr()
    damaged = open_checkpoint(tmp_path / "run").path / "module-000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert command_line(monkeypatch, tmp_path / "run") == 2
    line = capsys.readouterr().err
    assert line.startswith("localpipe: ") and line.count("\n") == 1
    assert "module-000.safetensors has changed since it was written" in line


def test_a_wrong_key_ends_with_one_line_and_exit_code_2(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(monkeypatch, run, "--set", "model.modules=2") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
