"""Short runs end with the weights and losses that were recorded: to the bit, for every method and schedule.

A change of the code that must not change the arithmetic (files that move, loops that are written anew) is held against
``same_weights.json``. Floating point sums depend on the processor and on torch, so that file keeps a record for every
machine that was recorded; on other machines nothing is compared. A change of the arithmetic that is wanted is recorded
with

    python tests/test_same_weights.py --record

which replaces the record of this machine, adds one where there is none, and says which rows have changed. Only public
names are used here, so that nothing inside the package can move without this test looking on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import platform
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from torch import Tensor, nn

from pipeline import LoaderData, from_dict, train

pytestmark = pytest.mark.long

RECORDS = Path(__file__).with_suffix("").with_name("same_weights.json")
CLASSES, IMAGE, BATCH = 4, (3, 8, 8), 8
EPOCH = (BATCH, BATCH, 6)
"""Images of each batch of an epoch; the last one is short."""
RESUME_AT = 5
"""In the second of two epochs of three steps, so that gradients of ``async`` are on their way."""

Section = dict[str, Any]
Result = dict[str, str | float]
"""Digests of the weights, and the losses of the last epoch, which JSON keeps to the bit."""


@dataclass(frozen=True)
class Row:
    """One short run: what differs from the defaults, and how it is run."""

    sections: dict[str, Section]
    own_network: bool = True
    resumed: bool = False
    ranks: int = 1
    same_as: str = ""
    """name of the row that must give the same result"""


@dataclass(frozen=True)
class Table:
    """Rows by name."""

    rows: dict[str, Row] = field(default_factory=dict)

    def add(
        self, name: str, method: str, shape: str, own_network: bool = True, same_as: str = "", **sections: Section
    ) -> None:
        """A row of a method, a shape of the hierarchy and further sections, called by all three."""
        merged: dict[str, Section] = {"method": METHODS[method]}
        for section, values in [*SHAPES[shape].items(), *sections.items()]:
            merged[section] = {**merged.get(section, {}), **values}
        full = ", ".join(part for part in (method, shape, name) if part)
        assert full not in self.rows, full
        self.rows[full] = Row(merged, own_network, same_as=same_as)

    def again(self, name: str, how: str, **run: Any) -> None:
        """Row ``name`` in another way that must not change the result."""
        self.rows[f"{name}, {how}"] = Row(self.rows[name].sections, same_as=name, **run)


METHODS: dict[str, Section] = {
    "dgl": {"name": "dgl", "head": "mlp-sr"},
    "dgl mlp": {"name": "dgl", "head": "mlp"},
    "dgl cnn": {"name": "dgl", "head": "cnn"},
    "dgl auglocal": {"name": "dgl", "head": "auglocal"},
    "greedy": {"name": "greedy"},
    "predsim": {"name": "predsim", "prediction_inputs": 16},
    "infopro": {"name": "infopro", "head": "1c2f", "feature_dim": 8},
    "infopro 2c2f": {"name": "infopro", "head": "2c2f", "feature_dim": 8, "widen": 2},
    "infopro-contrast": {"name": "infopro-contrast", "feature_dim": 8, "reconstruction": [5.0, 0.2]},
}
RELEASED = {"variant": "released", "independent_weight": 0.3, "cascade_weight": 0.7}
SHAPES: dict[str, dict[str, Section]] = {
    "plain": {},
    "patches": {"patches": {"grid": 2}},
    "cascade": {"hierarchy": {"cascade_span": 2}},
    "hpff": {"patches": {"grid": 2}, "hierarchy": {"cascade_span": 2}},
    "hpff k=3": {"patches": {"grid": 2}, "hierarchy": {"cascade_span": 3}},
    "hpff k=K": {"patches": {"grid": 2}, "hierarchy": {"cascade_span": 4}},
    "released": {"patches": {"grid": 2}, "hierarchy": {"cascade_span": 2, **RELEASED}},
    "released k=3": {"patches": {"grid": 2}, "hierarchy": {"cascade_span": 3, **RELEASED}},
    "K=1": {"model": {"modules": 1}},
}
HALVES = {"micro_batches": 2}
LATE: Section = {"kind": "async"}
LATER: Section = {"kind": "async", "delay": 2}
FREE: Section = {"kind": "free", "ring": 2}
ADAMW: Section = {"name": "adamw", "lr": 0.003, "weight_decay": 0.05}
DIGITS: Section = {"name": "digits", "batch_size": 16}


def make_table() -> dict[str, Row]:
    """Every method with and without the hierarchy; then one choice after another, on methods that take turns."""
    made = Table()
    for method in METHODS:
        for shape in ("plain", "hpff", "released"):
            made.add("", method, shape)
    for method, shape in (("dgl", "cascade"), ("greedy", "patches"), ("infopro", "hpff k=3"), ("dgl", "released k=3"),
                          ("infopro", "hpff k=K"), ("predsim", "hpff k=K"), ("dgl", "K=1")):  # fmt: skip
        made.add("", method, shape)
    made.add("no independent heads", "dgl", "hpff", hierarchy={"independent_weight": 0.0})
    made.add("no cascade heads", "infopro", "hpff", hierarchy={"cascade_weight": 0.0, "final_loss": "cascade"})
    made.add("stem alone", "predsim", "hpff", model={"stem": "own"})

    for method, shape in (("infopro", "hpff"), ("dgl auglocal", "released"), ("infopro-contrast", "plain"),
                          ("predsim", "hpff"), ("dgl", "K=1")):  # fmt: skip
        made.add("2 micro-batches", method, shape, schedule=HALVES)
    made.add("async", "infopro", "hpff", schedule=LATE)
    made.add("async", "dgl", "released k=3", schedule=LATE)
    made.add("async", "dgl mlp", "hpff k=K", schedule={**LATE, **HALVES})
    made.add("async d=2", "predsim", "hpff", schedule=LATER)
    made.add("async d=2", "dgl", "hpff", schedule={**LATER, **HALVES})
    made.add("async d=2", "greedy", "released", schedule=LATER)
    made.add("free", "dgl", "plain", same_as="dgl, plain", schedule=FREE)  # nobody waits in one process
    made.add("free", "infopro", "patches", schedule={**FREE, "max_uses": 1})

    made.add("adamw", "dgl", "hpff", optim=ADAMW)
    made.add("adamw", "infopro", "released", optim=ADAMW)
    made.add("adamw", "greedy", "K=1", optim=ADAMW)
    made.add("adamw, async", "infopro-contrast", "hpff", optim=ADAMW, schedule=LATE)
    made.add("cosine, clipped", "dgl cnn", "hpff", optim={"schedule": "cosine", "warmup_epochs": 1, "clip_norm": 0.5})
    made.add("step, no momentum", "predsim", "plain", optim={"schedule": "step", "momentum": 0.0, "nesterov": False})
    made.add("bf16", "infopro", "hpff", precision={"compute": "bf16"})
    made.add("fp64", "dgl", "hpff", precision={"compute": "fp64"})
    made.add("NCHW", "predsim", "hpff", precision={"channels_last": "off"})

    for name in ("infopro, hpff", "dgl, hpff, async d=2", "infopro-contrast, hpff, adamw, async"):
        made.again(name, "resumed", resumed=True)
    for name in ("infopro, hpff", "dgl, released k=3", "predsim, hpff, 2 micro-batches", "infopro, hpff, async",
                 "dgl, hpff, async d=2"):  # fmt: skip
        made.again(name, "2 ranks", ranks=2)

    for method, shape in (("infopro", "hpff"), ("dgl", "plain")):  # a network and data by name
        sections = {"model": {"name": "resnet20"}, "data": DIGITS, "train": {"max_steps": 2}}
        made.add("resnet20 on digits", method, shape, own_network=False, **sections)
    return made.rows


ROWS = make_table()

# --- one run ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1)
        # 3x3: in NHWC, the layout of all rows but one, oneDNN cannot do a narrow 1x1 convolution with a stride
        self.shortcut = nn.Conv2d(width_in, width, 3, stride, 1) if (width_in, stride) != (width, 1) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.norm(self.first(x)))) + self.shortcut(x))


def network(seed: int) -> nn.Sequential:
    """Six blocks, for four modules; one has Dropout, which draws from the random numbers of its step."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        Residual(4, 4, 1),
        nn.Sequential(Residual(4, 6, 2), nn.Dropout(0.2)),
        Residual(6, 6, 1),
        Residual(6, 6, 1),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
    )


def batches() -> list[tuple[Tensor, Tensor]]:
    """The batches of an epoch: uint8 images and labels."""
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randint(0, 256, (rows, *IMAGE), generator=generator, dtype=torch.uint8),
            torch.randint(0, CLASSES, (rows,), generator=generator),
        )
        for rows in EPOCH
    ]


def configuration(row: Row, **checkpoint: int) -> Any:
    values: dict[str, Section] = {
        "model": {"modules": 4},
        "patches": {"at_once": 1},
        "data": {"batch_size": BATCH},
        "optim": {"warmup_epochs": 0, "schedule": "constant", "lr": 0.05},
        "train": {"epochs": 2, "seed": 3},
        "precision": {"compute": "fp32"},
        "runtime": {"device": "cpu", "threads": 1, "deadline_s": 60.0},
        "checkpoint": {"every_epochs": 0, **checkpoint},
        "log": {"curve": False},
    }
    for section, entries in row.sections.items():
        values[section] = {**values.get(section, {}), **entries}
    return from_dict(values)


def run(row: Row, folder: Path) -> Result:
    """What is recorded of ``row``, run in this process or on this rank. Writes into ``folder``."""

    def trained(name: str, seed: int, resume: str, **checkpoint: int) -> dict[str, Any]:
        own: Section = {"network": network(seed), "data": LoaderData(batches(), batches())} if row.own_network else {}
        config = configuration(row, **checkpoint)
        with contextlib.redirect_stdout(io.StringIO()):
            return train(config, **own, run_dir=folder / name, resume=resume, quiet=True)

    if row.resumed:
        trained("first", 7, "auto", every_steps=RESUME_AT, keep=9)
        (saved,) = (folder / "first").glob(f"*/step-*{RESUME_AT}")
        summary = trained("run", 8, str(saved))  # other weights, which the checkpoint replaces
    else:
        summary = trained("run", 7, "auto")
    return {
        "weights_sha256": summary["weights_sha256"],
        "values_sha256": values_sha256(folder / "run"),
        "train_loss": summary["train_loss"],
        "test_loss": summary["test_loss"],
    }


def values_sha256(folder: Path) -> str:
    """Of all tensors of network and heads, whatever their names and order: tells other names from other weights."""
    states = [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("model", "heads")]
    tensors = [tensor for state in states for tensor in state.values()]
    digests = []
    for tensor in tensors:
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digests.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def run_on_rank(rank: int, folder: str) -> dict[str, Result]:
    """All rows of two ranks, one after the other."""
    rows = [(name, row) for name, row in ROWS.items() if row.ranks > 1]
    return {name: run(row, Path(folder) / str(number)) for number, (name, row) in enumerate(rows)}


def run_on_two_ranks(folder: Path) -> dict[str, Result]:
    """The same, seen from outside."""
    results = run_ranks(run_on_rank, 2, str(folder), timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    return results[0].value


# --- records ----------------------------------------------------------------------------------------------------------


def this_machine() -> dict[str, str]:
    """What the bits of a sum depend on: torch, and what its libraries look at when they choose an algorithm."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if platform.system() == "Linux" else ""
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = sorted(set(entries.get("flags", entries.get("Features", "")).split()))
    kept = ("vendor_id", "cpu family", "model", "cache size", "CPU implementer", "CPU part", "CPU variant")
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": " ".join([platform.machine(), *(entries[key] for key in kept if key in entries)]),
        "flags_sha256": hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16],
    }


def read_records() -> list[dict[str, Any]]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else []


def recorded_rows() -> dict[str, Result] | None:
    """Of this machine."""
    machine = this_machine()
    return next((record["rows"] for record in read_records() if record["machine"] == machine), None)


def record() -> None:
    """Run every row and keep the results as those of this machine."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: run(row, Path(folder) / name) for name, row in ROWS.items() if row.ranks == 1}
        found |= run_on_two_ranks(Path(folder))
    check_rows(found)
    before = recorded_rows() or {}
    changed = [name for name in found if name in before and found[name] != before[name]]
    others = [record for record in read_records() if record["machine"] != this_machine()]
    ordered = {name: found[name] for name in ROWS}
    RECORDS.write_text(json.dumps([*others, {"machine": this_machine(), "rows": ordered}], indent=1) + "\n")
    print(f"{len(found)} rows recorded, {len(found.keys() - before.keys())} of them new")
    print(f"changed: {'; '.join(changed) or 'none'}")


def check_rows(rows: dict[str, Result]) -> None:
    """What holds on every machine: a resume and a second rank change nothing, other rows have other weights."""
    assert rows.keys() == ROWS.keys(), "rows were added or removed; record anew"
    for name, row in ROWS.items():
        if row.same_as:
            assert rows[name] == rows[row.same_as], (name, row.same_as)
    seen: dict[str | float, str] = {}
    for name, row in ROWS.items():
        other = name if row.same_as else seen.setdefault(rows[name]["weights_sha256"], name)
        assert other == name, f"'{name}' and '{other}' have the same weights: one of them shows nothing"


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(read_records())))
def test_records_are_complete_and_every_row_shows_something(number: int) -> None:
    check_rows(read_records()[number]["rows"])


@pytest.fixture(scope="module")
def recorded() -> dict[str, Result]:
    if (rows := recorded_rows()) is None:
        pytest.skip(
            f"{RECORDS.name} has no record of this machine ({' '.join(this_machine().values())}); to make one, on a "
            f"commit that is right: python tests/{Path(__file__).name} --record"
        )
    return rows


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.ranks == 1])
def test_a_run_ends_with_the_recorded_weights(name: str, recorded: dict[str, Result], tmp_path: Path) -> None:
    assert run(ROWS[name], tmp_path) == recorded[name]


def test_runs_on_two_ranks_end_with_the_recorded_weights(recorded: dict[str, Result], tmp_path: Path) -> None:
    found = run_on_two_ranks(tmp_path)
    assert found == {name: recorded[name] for name in found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", required=True, help="replace or add this machine's record")
    parser.parse_args()
    record()
