"""The runs, tables, analyses and the report that say what local learning reaches."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config

from pipeline import ConfigError, recipes, train

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
(accuracy, analysis, features, image_subset, linear_probe, local_to_global, report, rows, runner, similarity, synthetic,
 training_runs) = map(importlib.import_module, (
    "accuracy", "analysis", "features", "image_subset", "linear_probe", "local_to_global", "report", "rows", "runner",
    "similarity", "synthetic_images", "training_runs"))  # fmt: skip


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_a_recipe_or_differs_from_one_by_its_end_its_modules_or_more_keys() -> None:
    start = "cifar10-resnet32-k16-dgl"
    assert rows.row_of(start).config().patches.grid == 1
    assert rows.row_of(f"{start}-hpff").config().patches.grid == 2
    both_levels = rows.row_of(f"{start}-hilo").config()
    assert both_levels.hierarchy.cascade_span == 2 and both_levels.patches.grid == 1
    assert rows.row_of(f"{start}-deepsup").config().hierarchy.variant == "deepsup"
    four = rows.row_of("cifar10-resnet32-k4-infopro-hpff-released,optim.lr=0.3")
    config = four.config(["optim.lr=0.1"])
    assert config.model.modules == 4 and config.hierarchy.variant == "released" and config.optim.lr == 0.3
    assert four.title == "InfoPro + HPFF, released, optim.lr=0.3"
    with pytest.raises(ConfigError, match="--rows cifar10-resnet32-k16-dlg: no recipe is behind it"):
        rows.row_of("cifar10-resnet32-k16-dlg")


def test_every_row_that_a_paper_has_can_be_trained() -> None:
    names = {name for table in rows.papers("errors") for name in table if name != "source"}
    assert len(names) > 40
    for name in names:
        row = rows.row_of(name)
        config = row.config()
        found = re.search(r"-k(\d+)-", name)
        assert row.published and config.model.modules == (int(found[1]) if found else 1), name


def test_the_papers_figures_are_written_once() -> None:
    of_recipes = {(recipe.name, recipe.table) for recipe in recipes()}
    others = [(name, table["source"]) for table in rows.papers("errors") for name in table if name != "source"]
    assert len(set(others)) == len(others) and not of_recipes & set(others)


def test_a_group_is_all_rows_of_a_table() -> None:
    assert len(rows.expanded(["hpff-table-1"])) == 78
    parts = [rows.row_of(name) for name in rows.expanded(["hpff", "ablation"])]
    assert len({row.title for row in parts if row.name.split("-")[2] == "k16"}) == len({row.name for row in parts}) - 6
    assert all(row.config() for row in parts)
    spans = [rows.row_of(name).config() for name in rows.expanded(["local-to-global"])]
    found = {(config.model.modules, config.hierarchy.cascade_span) for config in spans}
    assert found == {(1, 1)} | {(k, s) for k in (2, 4, 8, 16) for s in (1, 2, 4, 8, 16) if s <= k}


# --- runs -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def of_drawn_images(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings of two rows on drawn images, eight epochs of four steps."""
    root = tmp_path_factory.mktemp("accuracy")
    return accuracy.Settings(
        rows=("cifar10-resnet32-bp", "cifar10-resnet32-k4-dgl"), network="resnet20", precision="fp32", threads=1,
        data=str(synthetic.draw_images(root / "all")), train_images=78, epochs=(8,), batch=20, warmup=0, lr=0.02,
        root=str(root / "runs"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def killed_and_resumed(of_drawn_images: Any) -> Any:
    """The report of two runs: one was complete before; the other was killed in the middle, with what had started it,
    and then went on."""
    complete, other = (each.run for each in accuracy.plan(of_drawn_images))
    train(complete.config, run_dir=complete.folder, quiet=True)
    child = os.fork()
    if child == 0:
        accuracy.measure(of_drawn_images)
        os._exit(0)
    wait_for(other.folder / "metrics.jsonl")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert complete.complete and not other.complete
    wait_for(other.log, "stopped by SIGTERM")  # that the kernel has sent it
    report = accuracy.measure(of_drawn_images)
    assert not complete.log.exists()  # it was not started again
    return report


def wait_for(path: Path, text: str = "") -> None:
    end = time.monotonic() + 60
    while not path.is_file() or text not in (found := path.read_text()) or not found:
        assert time.monotonic() < end, path
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_result_of_one_that_was_not(
    of_drawn_images: Any, killed_and_resumed: Any, tmp_path: Path
) -> None:
    assert not killed_and_resumed.findings  # all are complete
    row, each = killed_and_resumed.rows[1], accuracy.plan(of_drawn_images)[1]
    train(each.run.config, run_dir=tmp_path / "whole", quiet=True)
    whole = training_runs.TrainingRun(each.run.config, tmp_path / "whole")
    (expected,) = accuracy.results([replace(each, run=whole)])
    assert [epoch for epoch, _ in row["runs"][0]["curve"]] == list(range(1, 9))
    for field in ("error", "curve", "exits", "losses", "steps"):
        assert row["runs"][0][field] == expected["runs"][0][field], field
    assert (row["name"], row["error"], row["images"]) == (expected["name"], expected["error"], 78)


@pytest.mark.slow
def test_the_table_has_the_errors_of_the_runs_and_of_the_papers(
    of_drawn_images: Any, killed_and_resumed: Any, tmp_path: Path
) -> None:
    bp, local = killed_and_resumed.rows
    page = killed_and_resumed.page(killed_and_resumed.document(of_drawn_images), "the command", None)
    for row, each in ((bp, 0), (local, 1)):
        folder = accuracy.plan(of_drawn_images)[each].run.folder
        assert row["error"] == json.loads((folder / "summary.json").read_text())["test_error_pct"]
    gap = local["error"] - bp["error"]
    assert f"| DGL | 4 | 8 | 1 | {local['error']:.2f} | {gap:+.2f} | 11.48 ± 0.20 (InfoPro, table 2) | +4.11 |" in page
    assert {each["level"] for each in local["runs"][0]["exits"]} == {"independent", "final"}
    assert "78 training images an epoch, batch 20" in page

    again = accuracy.measure(replace(of_drawn_images, report=True))
    assert again.rows == killed_and_resumed.rows
    again.draw(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_several_seeds_are_a_mean_and_a_deviation(tmp_path: Path) -> None:
    row = rows.row_of("cifar10-resnet32-k16-dgl")
    planned = []
    for seed, error in enumerate((40.0, 44.0)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        summary = {"test_error_pct": error, "modules": 15, "steps": 2, "train_wall_s": 1.0, "precision": "float32"}
        (folder / "summary.json").write_text(json.dumps(summary))
        epoch = {"epoch": 1, "test_error_pct": error, "train_loss": 1.0, "images": 10, "modules": []}
        (folder / "metrics.jsonl").write_text(json.dumps(epoch) + "\n")
        planned.append(accuracy.Planned(row, 1, seed, training_runs.TrainingRun(row.config(), folder)))
    missing = accuracy.Planned(row, 1, 2, training_runs.TrainingRun(row.config(), tmp_path / "2"))
    (found,) = accuracy.results([*planned, missing])
    assert found["seeds"] == [0, 1] and found["error"] == 42.0
    assert found["spread"] == pytest.approx(8**0.5)  # of two, 4 apart


def test_a_run_has_one_process_or_those_of_torchrun(tmp_path: Path) -> None:
    run = training_runs.TrainingRun(tiny_config(), tmp_path / "run")
    assert run.command(4) == [*run.command(1), "--nproc", "4"]
    assert run.command(1)[1:4] == ["-m", "pipeline", "train"] and "auto" in run.command(1)


def test_a_run_that_fails_does_not_end_the_others_and_is_named(tmp_path: Path) -> None:
    class Pretended(training_runs.TrainingRun):
        def command(self, ranks: int) -> list[str]:
            if self.folder.name == "bad":
                return [sys.executable, "-c", "print('no room left'); raise SystemExit(3)"]
            return [sys.executable, "-c", f"open({str(self.folder / 'summary.json')!r}, 'w')"]

    runs = [Pretended(tiny_config(), tmp_path / name) for name in ("bad", "good")]
    (tmp_path / "good").mkdir()
    outcome = training_runs.run_all(runs, tmp_path / "STOP")
    assert runs[1].complete and outcome.stopped == ""
    assert len(outcome.failed) == 1 and "bad failed with code 3: no room left" in outcome.failed[0]


@pytest.mark.parametrize("by", ["SIGTERM", "STOP"])
def test_a_signal_or_a_file_ends_all_runs_and_nothing_is_left_behind(tmp_path: Path, by: str) -> None:
    class Sleeps(training_runs.TrainingRun):
        def command(self, ranks: int) -> list[str]:
            done = f"open({str(self.folder.with_suffix('.pid'))!r}, 'w').write(str(os.getpid()))"
            return [sys.executable, "-c", f"import os, time; {done}; time.sleep(600)"]

    pid_file = tmp_path / "run.pid"
    runs = [Sleeps(tiny_config(), tmp_path / "run"), Sleeps(tiny_config(), tmp_path / "waits")]
    child = os.fork()
    if child == 0:
        outcome = training_runs.run_all(runs, tmp_path / "STOP")
        os._exit(7 if by in outcome.stopped and not outcome.failed else 1)
    wait_for(pid_file)
    if by == "STOP":
        (tmp_path / "STOP").touch()
    else:
        os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not Path(f"/proc/{pid_file.read_text()}").exists()
    assert not (tmp_path / "waits.pid").exists()
    if by == "STOP":
        with pytest.raises(ConfigError, match="STOP' is there, which stops all runs; remove it to go on"):
            training_runs.run_all(runs, tmp_path / "STOP")


def test_a_subset_of_an_image_folder_is_even_and_always_the_same(tmp_path: Path) -> None:
    data = synthetic.draw_images(tmp_path / "all", 4, 2)
    some = image_subset.subset(data, 6, tmp_path)
    names = {place.name: sorted(path.name for path in place.iterdir()) for place in (some / "train").iterdir()}
    assert names == {
        "bars": ["000.png", "001.png"], "checks": ["000.png", "001.png"], "columns": ["000.png"], "rings": ["000.png"]
    }  # fmt: skip
    assert len(list((some / "test").glob("*/*.png"))) == 8 and image_subset.subset(data, 6, tmp_path) == some
    assert image_subset.subset(data, 0, tmp_path) == data
    with pytest.raises(ConfigError, match="class 'bars' .* has only 4 images"):
        image_subset.subset(data, 40, tmp_path)
    with pytest.raises(ConfigError, match="no train/CLASS and test/CLASS"):
        image_subset.subset(tmp_path / "none", 6, tmp_path)


# --- analyses ---------------------------------------------------------------------------------------------------------


def test_cka_is_one_of_what_is_rotated_and_scaled_and_about_zero_of_what_is_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    other = torch.randn(400, 30, generator=generator, dtype=torch.float64)
    batches = [([a], [3 * a @ rotation, a + 5, b]) for a, b in zip(x.split(50), other.split(50), strict=True)]
    rotated, moved, independent = similarity.cka(batches)[0].tolist()
    assert rotated == pytest.approx(1.0) and moved == pytest.approx(1.0)  # rotation, scale; an offset of all features
    assert abs(independent) < 0.05  # the biased estimate is 0.3 for so many features and so few images


def test_hsic_is_the_mean_over_all_choices_of_four_different_images() -> None:
    """HSIC_1 by its definition, as a U-statistic: E[K_ij L_ij] + E[K_ij L_qr] - 2 E[K_ij L_iq], no index twice."""
    generator = torch.Generator().manual_seed(1)
    k, l = (similarity.gram(torch.randn(6, 3, generator=generator)) for _ in range(2))  # noqa: E741
    different = [(i, j, q, r) for i in range(6) for j in range(6) for q in range(6) for r in range(6)
                 if len({i, j, q, r}) == 4]  # fmt: skip
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in different]
    assert float(similarity.hsic(k, l)) == pytest.approx(float(sum(terms)) / len(different))


def test_cka_of_two_small_matrices_is_the_known_value() -> None:
    """K = [[., 1, 2, 3], ...] and L by hand: with four images tr(KL) - 2/2 1'KL1 + 1'K1 1'L1 / 6, over 4."""
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    y = torch.tensor([[1.0], [0.0], [0.0], [2.0]])
    # K off the diagonal: 2 3 4 6 8 12 (sum 70 both ways), rows 9 16 21 24; L: only (0, 3) = 2, rows 2 0 0 2
    assert float(similarity.hsic(similarity.gram(x), similarity.gram(y))) == pytest.approx((16 + 70 * 4 / 6 - 66) / 4)


def test_a_linear_probe_reads_what_is_separable_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    centres = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
    separable = centres[labels] + 0.3 * torch.randn(300, 2, generator=generator)
    noise = torch.randn(300, 2, generator=generator)
    half = slice(0, 150), slice(150, 300)
    of = [linear_probe.probe_error(*((x[part], labels[part]) for part in half)) for x in (separable, noise)]
    assert of[0] == 0.0 and 50 < of[1] < 80  # by chance 66.7


def test_features_are_pooled_to_as_many_positions_as_wanted() -> None:
    maps = torch.arange(32.0).reshape(1, 2, 4, 4)
    assert linear_probe.pooled(maps, 1).tolist() == [[7.5, 23.5]]
    assert linear_probe.pooled(maps, 2).shape == (1, 8) and linear_probe.pooled(maps, 9).shape == (1, 32)


@pytest.fixture(scope="module")
def two_networks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings of an analysis of two tiny networks trained on drawn images."""
    data, runs = synthetic.train_two(tmp_path_factory.mktemp("analysis"))
    return analysis.Settings(runs=runs, data=str(data), train_images=60, test_images=40, batch=20, shown=2)


def test_a_checkpoint_opens_with_the_outputs_of_its_blocks(two_networks: Any) -> None:
    bp, hpff = map(features.open_trained, two_networks.runs)
    assert (bp.title, bp.method, len(bp.modules)) == ("BP", "bp", 1)
    assert (hpff.title, hpff.method, len(hpff.modules)) == ("DGL + HPFF", "dgl", 3)
    images, labels = features.labelled_images(Path(two_networks.data), "test", 10, bp.image_shape)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1] and images.shape == (10, 3, 16, 16)
    (outputs,) = bp.outputs(images)
    assert list(outputs) == list(bp.blocks) and outputs["layer3.2"].shape == (10, 64, 4, 4)
    with torch.no_grad():
        scores = bp.network((images.float() / 255 - bp.mean) / bp.std)
        assert torch.equal(bp.network.classifier(outputs["layer3.2"]), scores)


@pytest.mark.parametrize("what", ["probe", "cka", "maps", "tsne"])
def test_every_analysis_has_data_and_a_figure(two_networks: Any, what: str, tmp_path: Path) -> None:
    if what == "tsne":
        pytest.importorskip("sklearn")
    found = analysis.measure(replace(two_networks, what=what))
    assert found.about[0].startswith("BP: bp, K = 1, epoch 1; DGL + HPFF: dgl, K = 3, epoch 1.")
    entries = found.tables[0].rows if found.rows is None else found.rows
    if what == "probe":
        assert len(entries) == 20 and all(0 <= row["error"] <= 75 for row in entries)
    elif what == "cka":
        assert [row["block"] for row in entries] == entries[0]["reference_blocks"]
        assert entries[0]["same"] > entries[-1]["same"] and all(len(row["all"]) == 10 for row in entries)
    elif what == "maps":
        values = [value for row in entries for line in row["map"] for value in line]
        assert (min(values), max(values)) == (0.0, 1.0) and len(entries) == 2 * 3 * 2
        assert all(0 < row["area"] <= 1 for row in entries)
    else:
        assert all(len(row["points"]) == len(row["labels"]) == 40 for row in entries)
    json.dumps(entries)
    found.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_an_analysis_says_what_is_missing(two_networks: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--runs TITLE=DIR .* and --data DIR are needed"):
        analysis.measure(analysis.Settings())
    with pytest.raises(ConfigError, match=r"no test/CLASS in it|no train/CLASS in it"):
        analysis.measure(replace(two_networks, data=str(tmp_path)))
    with pytest.raises(ConfigError, match="--at layer9: BP has the blocks stem, "):
        analysis.measure(replace(two_networks, what="maps", at=("layer9",)))
    with pytest.raises(ConfigError, match="--batch 99"):
        analysis.measure(replace(two_networks, what="cka", batch=99))


def as_command(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """A benchmark as ``__main__``."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")


def test_commands_write_what_they_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("maps.json", "maps.md", "maps.png")]
    options = [str(part) for pair in zip(("--json", "--output", "--chart"), files, strict=True) for part in pair]
    as_command(monkeypatch, "analysis", "--quick", "--what", "maps", *options)
    assert len(json.loads(files[0].read_text())["rows"]) == 12
    assert "![Activation maps](maps.png)" in files[1].read_text()
    as_command(monkeypatch, "report", "--results", str(tmp_path), "--output", str(tmp_path / "report.html"))
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit, match="accuracy.py: --root .*: no run of these rows is complete yet"):
        as_command(monkeypatch, "accuracy", "--quick", "--report", "--root", str(tmp_path / "none"))


# --- from local to global ---------------------------------------------------------------------------------------------


def of_system(system: str, modules: int, units: float, curve: list[list[float]]) -> dict[str, Any]:
    return {"system": system, "modules": modules, "reached": [[epoch * units, error] for epoch, error in curve]}


def test_who_reaches_an_error_first_is_told_by_time_and_not_by_epochs() -> None:
    curves = [of_system("BP", 1, 1.0, [[1, 60.0], [2, 40.0]]), of_system("BP, ZBV", 1, 0.25, [[1, 60.0], [2, 40.0]]),
              of_system("DGL", 4, 0.1, [[1, 70.0], [2, 58.0]])]  # fmt: skip
    found = dict(local_to_global.gains(curves, "BP, ZBV"))
    assert found[60] == pytest.approx(0.2 / 0.25)  # two epochs of DGL, one of backpropagation
    assert found[70] == pytest.approx(0.1 / 0.25) and 57 not in found  # DGL never gets there
    assert dict(local_to_global.gains(curves, "BP"))[60] == pytest.approx(0.2)
    assert local_to_global.told(list(found.items())) == "58 - 59 %: 0.40, 60 - 69 %: 0.80, 70 - 70 %: 0.40"


def test_time_and_memory_stand_beside_the_errors_of_runs(tmp_path: Path) -> None:
    trained = []
    for name, title, modules in (("bp", "BP", 1), ("k4-dgl", "DGL", 4)):
        curve = [[1, 80.0], [2, 60.0 + modules]]
        trained.append({
            "name": f"cifar10-resnet32-{name}", "title": title, "group": "cifar10-resnet32", "epochs": 2, "k": modules,
            "modules": modules, "error": 60.0 + modules, "images": 100, "runs": [{"curve": curve}],
        })  # fmt: skip
    file = tmp_path / "accuracy.json"
    file.write_text(json.dumps({"settings": {"batch": 16, "network": "resnet20"}, "rows": trained}))
    settings = local_to_global.Settings(accuracy=str(file), steps=1, batch=8, ranks=2, micro_batches=2)
    found = local_to_global.measure(settings)
    by = {row["system"]: row for row in found.tables[0].rows}
    assert by["BP"]["units"] == 1.0 and by["BP, 1F1B"]["units"] == 0.75 and by["BP, ZBV"]["units"] == 0.5
    assert by["DGL"]["units"] > 0 and by["DGL"]["ranks"] == 2 and by["DGL"]["bytes"] < by["BP"]["bytes"]
    found.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="no row of that budget"):
        local_to_global.measure(replace(settings, epochs=7))


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_holds_every_page_number_and_figure_and_needs_no_other_file() -> None:
    folder = BENCHMARKS / "results"
    text = report.report(folder)
    plain = re.sub(r"<[^>]+>", " ", re.sub(r"base64,[^\"]+", "", text))
    numbers = set(re.findall(r"\d[\d.,]*", plain))
    for page in folder.glob("*.md"):
        assert f'<section id="{page.stem}">' in text, page
        table = [line for line in page.read_text().splitlines() if line.startswith("|")]
        missing = set(re.findall(r"\d[\d.,]*", " ".join(table))) - numbers
        assert not missing, (page, missing)
        assert "benchmarks/" in page.read_text() or "launch/" in page.read_text(), page  # its command
    pictures = list(folder.glob("*.png"))
    assert text.count("data:image/png;base64,") == len(pictures) > 0
    assert not re.search(r"<(?:img|script|link)[^>]*(?:src|href)=\"(?!data:)", text)


def test_markdown_becomes_html_and_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text(
        "# A < B\n\n`a<b`, **bold**, [text](https://example.org) and [file](x.json)\n\n* one\n* two\n  more\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 % |\n\n```bash\nrun --this\n```\n"
    )
    text = report.report(tmp_path)
    for part in (
        "<h2>A &lt; B</h2>", "<code>a&lt;b</code>, <b>bold</b>", '<a href="https://example.org">text</a> and file',
        "<ul><li>one</li><li>two more</li></ul>", "<tr><th>a</th><th>b</th></tr>\n<tr><td>1</td><td>2 %</td></tr>",
        "<pre>run --this\n</pre>",
    ):  # fmt: skip
        assert part in text, part
    (tmp_path / "x.md").write_text("# X\n\n![figure](none.png)\n")
    with pytest.raises(ConfigError, match="figure '.*none.png' of a page cannot be read"):
        report.report(tmp_path)
    with pytest.raises(ConfigError, match="no page"):
        report.report(tmp_path / "empty")
