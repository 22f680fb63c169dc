"""A tiny decoder on a tiny text, and what it is trained by."""

from __future__ import annotations

from pathlib import Path

from pipeline import Config, load_config, train

TEXT = "".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(100)).encode()
LENGTH, TESTED = 16, len(TEXT) // 10
PLAIN = (
    *("model.name=decoder/6x8x2", "model.modules=4", "model.cuts=even", "partition.kind=count", "patches.grid=1"),
    *("data.name=text", f"data.length={LENGTH}", "data.batch_size=8", "train.epochs=1", "train.max_steps=3"),
    *("optim.name=adamw", "optim.lr=0.01", "optim.schedule=constant", "optim.warmup_epochs=0"),
    *("precision.compute=fp32", "runtime.device=cpu", "runtime.threads=1", "runtime.deadline_s=30"),
    *("log.curve=false", "checkpoint.every_epochs=0"),
)
HPFF = ("method.name=greedy", "hierarchy.cascade_span=2", "patches.grid=2", "patches.at_once=2")
CASES: dict[str, tuple[str, ...]] = {
    "hpff": HPFF,
    "hpff, one by one, async": (*HPFF, "patches.at_once=1", "schedule.kind=async", "schedule.micro_batches=2"),
    "infopro": ("method.name=infopro", "hierarchy.cascade_span=1"),
    "man": ("method.name=greedy", "hierarchy.cascade_span=1", "method.front=man", "method.average=0.5"),
    "lopt": ("method.name=lopt", "hierarchy.cascade_span=2", "schedule.kind=async"),
    "sgr": ("method.name=dgl", "hierarchy.cascade_span=1", "method.reconciliation=0.001"),
}


def configured(file: Path, *assignments: str) -> Config:
    return load_config(assignments=[*PLAIN, f"data.root={file}", *assignments])


def trained_on_text(rank: int, folder: Path) -> dict[str, tuple[str, float]]:
    """Digest of the weights, and perplexity, of every case."""
    if rank == 0:  # nobody else reads it
        folder.mkdir()
        (folder / "sums.txt").write_bytes(TEXT)
    found = {}
    for case, assignments in CASES.items():
        summary = train(configured(folder / "sums.txt", *assignments), run_dir=folder / case, quiet=True)
        found[case] = summary["weights_sha256"], summary["test_metrics"]["perplexity"]
    return found
