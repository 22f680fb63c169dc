"""Test errors of rows of the papers' tables, at a budget of your own, beside backpropagation and the papers' figures.

    python benchmarks/accuracy.py --data CIFAR10_FOLDER --train-images 10000 --epochs 4 --root runs/accuracy
    python benchmarks/accuracy.py --rows cifar10-resnet32-bp cifar10-resnet32-k8-dgl-hpff --epochs 10 --seeds 0 1 2

A run directory per row, budget and seed; the same command goes on after any interruption, and a file STOP in --root,
SIGTERM or ctrl-C interrupt it in order. The table has the test error after the last epoch, mean and standard deviation
over the seeds: no epoch and no seed is picked. Names of rows: benchmarks/rows.py.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from accuracy_chart import draw
from image_subset import subset
from rows import OF_HPFF, TableRow, expanded, row_of
from runner import Report, Target, main, option
from tables import Column, Row, Table
from training_runs import STOP, TrainingRun, run_all

from pipeline import ConfigError, read_metrics

ORDER = (
    ("k16-dgl", "k16-dgl-hilo"), ("k16-dgl-hilo", "k16-dgl-hpff"), ("k16-dgl", "k16-dgl-hpff"),
    ("k16-infopro", "k16-infopro-hilo"), ("k16-infopro-hilo", "k16-infopro-hpff"), ("k16-infopro", "k16-infopro-hpff"),
)  # fmt: skip
"""The papers' order: the first of each two has the larger error."""
DIGITS = "digits"
NEAR_BP = 1.5
"""Points above backpropagation that the best local row at K = 16 has at most; written before it was measured."""


@dataclass(frozen=True)
class Settings:
    rows: tuple[str, ...] = option(("hpff",), "or groups of them; hpff: its tables for ResNet-32, K = 16 and 4", "NAME")
    root: str = option("runs/accuracy", "where the run directories are", "DIR")
    data: str = option("", "in place of the recipe's data set: a folder train/CLASS, test/CLASS, or digits", "DIR")
    train_images: int = option(0, "so many of the training images, evenly by class; 0: all", "N", above=-1)
    epochs: tuple[int, ...] = option((4,), "budgets, one after the other; the table has all of them", "N")
    seeds: tuple[int, ...] = option((0,), "one run each", "N", above=-1)
    batch: int = option(128, "images of a step", "N")
    lr: float = option(0.1, "peak learning rate", "LR")
    warmup: int = option(1, "epochs", "N", above=-1)
    test_every: int = option(1, "epochs from test to test; the last one is always tested", "N")
    precision: str = option("auto", "arithmetic", choices=("auto", "fp32", "bf16"))
    ranks: int = option(1, "processes of a run, one stage each; on GPUs one per device", "P")
    side_by_side: int = option(1, "runs at a time", "N")
    threads: int = option(0, "CPU threads of a process; 0: cores / processes", "N", above=-1)
    save_minutes: float = option(2.0, "from checkpoint to checkpoint, besides those after every epoch", "MINUTES")
    report: bool = option(False, "train nothing: the table of what there is")
    network: str = option("", "model.name of every row, for a try", "NAME")


@dataclass(frozen=True)
class Planned:
    """A run and where it stands in the table."""

    row: TableRow
    epochs: int
    seed: int
    run: TrainingRun


def plan(settings: Settings) -> list[Planned]:
    """All runs: the smallest budget of all rows and seeds first, so that what is finished makes a table.

    Raises:
        ConfigError: no such row, no such data, a value out of range.
    """
    rows = [row_of(name) for name in expanded(settings.rows)]
    of_folder = settings.data not in ("", DIGITS)
    if settings.train_images and not of_folder:
        raise ConfigError("--train-images needs --data DIR, a folder of images of which it can take some")
    root = Path(settings.root).absolute()
    folder = subset(Path(settings.data), settings.train_images, root) if of_folder else None
    planned = []
    for epochs, seed, row in product(sorted(set(settings.epochs)), settings.seeds, rows):
        name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', row.name)}--{_budget(settings, epochs)}-seed{seed}"
        config = row.config([*_common(settings, folder), f"train.epochs={epochs}", f"train.seed={seed}"])
        planned.append(Planned(row, epochs, seed, TrainingRun(config, root / name)))
    return planned


def _budget(settings: Settings, epochs: int) -> str:
    parts = [f"n{settings.train_images or 'all'}", f"e{epochs}", f"b{settings.batch}", f"lr{settings.lr:g}"]
    return "-".join([*parts, settings.network] if settings.network else parts)


def _common(settings: Settings, folder: Path | None) -> list[str]:
    """What all rows share, in place of the papers' recipe."""
    keys = [
        f"data.batch_size={settings.batch}", f"optim.lr={settings.lr:g}", f"optim.warmup_epochs={settings.warmup}",
        f"train.evaluate_every={settings.test_every}", f"precision.compute={settings.precision}",
        f"runtime.threads={settings.threads}", f"checkpoint.every_minutes={settings.save_minutes:g}",
        "checkpoint.keep=1", "checkpoint.keep_best=false", "log.curve=false",
    ]  # fmt: skip
    keys += [f"model.name={settings.network}"] if settings.network else []
    if settings.data == DIGITS:
        return [*keys, "data.name=digits", "data.root="]
    return keys if folder is None else [*keys, "data.name=folder", f"data.root={json.dumps(str(folder))}"]


# --- what came out ----------------------------------------------------------------------------------------------------


def results(planned: Sequence[Planned]) -> Iterator[Row]:
    """A row for each name and budget of which a run is complete; the runs of all seeds in it."""
    for epochs, name in dict.fromkeys((each.epochs, each.row.name) for each in planned):
        same = [each for each in planned if (each.epochs, each.row.name) == (epochs, name)]
        runs = [_result(each) for each in same if each.run.complete]
        if not runs:
            continue
        row, errors = same[0].row, [run["error"] for run in runs]
        yield {
            "name": name, "title": row.title, "group": row.group, "epochs": epochs, "modules": runs[0]["modules"],
            "k": same[0].run.config.model.modules,
            "seeds": [run["seed"] for run in runs], "error": statistics.fmean(errors),
            "spread": statistics.stdev(errors) if len(errors) > 1 else None,
            "published": [list(entry) for entry in row.published],
            "images": runs[0]["images"], "seconds": statistics.fmean(run["seconds"] for run in runs),
            "keys": list(row.keys), "recipe": row.recipe, "runs": runs,
        }  # fmt: skip


def _result(planned: Planned) -> Row:
    """One complete run: error after the last epoch, curve, error of every exit."""
    summary = json.loads((planned.run.folder / "summary.json").read_text(encoding="utf-8"))
    epochs = read_metrics(planned.run.folder / "metrics.jsonl")
    return {
        "seed": planned.seed, "folder": planned.run.folder.name, "error": summary["test_error_pct"],
        "modules": summary["modules"], "steps": summary["steps"], "seconds": summary["train_wall_s"],
        "precision": summary["precision"], "images": epochs[-1]["images"],
        "curve": [[each["epoch"], each["test_error_pct"]] for each in epochs if each["test_error_pct"] is not None],
        "losses": [[each["epoch"], each["train_loss"]] for each in epochs],
        "exits": [
            {"module": module["index"], "blocks": module["blocks"], "level": level, "error": error}
            for module in epochs[-1]["modules"] for level, error in module["head_error_pct"].items()
            if error is not None
        ],
    }  # fmt: skip


def beside_bp(rows: Sequence[Row]) -> None:
    """Add ``above_bp`` and ``paper_above_bp``: points above backpropagation of the same data, network and budget, and
    in the paper's table."""
    base = {(row["group"], row["epochs"]): row for row in rows if row["modules"] == 1}
    for row in rows:
        bp = base.get((row["group"], row["epochs"]))
        row["above_bp"] = row["error"] - bp["error"] if bp else None
        of_paper = {entry[2].partition(",")[0]: entry[0] for entry in (bp or row_of_bp(row))["published"]}
        first = row["published"][0] if row["published"] else None
        paper = of_paper.get(first[2].partition(",")[0]) if first else None
        row["paper_above_bp"] = first[0] - paper if first and paper is not None else None


def row_of_bp(row: Row) -> Row:
    """Backpropagation beside a row whose own was not run: what the papers say of it."""
    try:
        return {"published": row_of(f"{row['group']}-bp").published}
    except ConfigError:
        return {"published": ()}


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """The papers' order, and how near to backpropagation, at every budget of ResNet-32 on CIFAR-10."""
    by = {(row["name"].removeprefix("cifar10-resnet32-"), row["epochs"]): row for row in rows}
    titles = {name: row["title"] for (name, _), row in by.items()}
    budgets = sorted({epochs for _, epochs in by})
    for more, less in ORDER:
        found = {f"{e} epochs": by[more, e]["error"] - by[less, e]["error"] for e in budgets
                 if (more, e) in by and (less, e) in by}  # fmt: skip
        if found:
            yield Target(f"points from {titles[more]} to {titles[less]}, K = 16", found, least=0.0)
    best = {}
    for e in budgets:
        local = [row for (name, epochs), row in by.items() if epochs == e and name.startswith("k16-")
                 and not name.endswith("-deepsup") and row["above_bp"] is not None]  # fmt: skip
        if local:
            row = min(local, key=lambda row: row["error"])
            best[f"{e} epochs, {row['title']}"] = row["above_bp"]
    yield Target("points above backpropagation of the best local row, K = 16", best, most=NEAR_BP)


# --- report -----------------------------------------------------------------------------------------------------------


def _error(row: Row) -> str:
    return f"{row['error']:.2f}" + (f" ± {row['spread']:.2f}" if row["spread"] is not None else "")


def _paper(row: Row) -> str:
    return "; ".join(
        f"{mean:.2f}" + (f" ± {spread:.2f}" if spread is not None else "") + f" ({source})"
        for mean, spread, source in row["published"]
    )


COLUMNS = (
    Column("row", "title"), Column("K", "k"), Column("epochs", "epochs"),
    Column("seeds", lambda row: len(row["seeds"])), Column("test error %", _error),
    Column("above BP", "above_bp", "+.2f"), Column("paper's error %", _paper),
    Column("above its BP", "paper_above_bp", "+.2f"),
)  # fmt: skip
EXITS = (
    Column("row", "title"), Column("K", "k"), Column("epochs", "epochs"),
    Column("error of the exits, %, from module 0 to the last", "line"),
)  # fmt: skip


def exit_lines(rows: Sequence[Row]) -> Iterator[Row]:
    """The exits of a level in order, mean over the seeds."""
    for row in rows:
        found: dict[str, dict[int, list[float]]] = {}
        for run in row["runs"]:
            for each in run["exits"]:
                found.setdefault(each["level"], {}).setdefault(each["module"], []).append(each["error"])
        final = found.pop("final", {})
        for level, errors in found.items():
            line = [statistics.fmean(values) for _, values in sorted({**errors, **final}.items())]
            yield {**row, "title": f"{row['title']}, {level}", "line": " ".join(f"{value:.1f}" for value in line)}


def measure(settings: Settings) -> Report:
    """Train what is missing, then the table of all that is complete."""
    planned = plan(settings)
    findings = []
    if not settings.report:
        runs = [each.run for each in planned]
        outcome = run_all(runs, Path(settings.root) / STOP, settings.ranks, settings.side_by_side)
        findings += outcome.failed
        if outcome.stopped:
            print(f"stopped by {outcome.stopped}; the same command goes on", file=sys.stderr, flush=True)
    rows = list(results(planned))
    if not rows:
        raise ConfigError(f"--root {settings.root}: no run of these rows is complete yet; the same command goes on")
    beside_bp(rows)
    missing = len(planned) - sum(len(row["runs"]) for row in rows)
    if missing:
        findings.append(f"{missing} of {len(planned)} runs are not complete; the same command goes on with them.")
    images = sorted({row["images"] for row in rows})
    about = (
        f"Budget: {', '.join(f'{count:,}' for count in images)} training images an epoch, batch {settings.batch}, peak "
        f"learning rate {settings.lr:g}, epochs of warm-up: {settings.warmup}, cosine to 0; all else as in the recipe "
        "of the row. K as the papers count it; their cut of ResNet-32 at K = 16 has 15 modules. Test error in % after "
        "the last epoch, mean ± standard deviation over seeds (no ±: one seed). Above BP: points above backpropagation "
        "with the same budget; above its BP: the same in the table of the paper, which trains for 400 (HPFF) or 160 "
        "epochs (InfoPro) of all images in batches of 1024."
    )
    tables = [Table(COLUMNS, rows), Table(EXITS, list(exit_lines(rows)), "Error by exit")]
    return Report("Test error of the rows of the papers' tables", tables, [about], list(targets(rows)), findings,
                  rows=rows, draw=lambda path: draw(rows, path))  # fmt: skip


if __name__ == "__main__":
    tiny = {"rows": OF_HPFF[:3], "epochs": (1,), "network": "resnet20", "data": DIGITS}
    main(__doc__, Settings, measure, quick=tiny, chart="curves, and the error by exit")
