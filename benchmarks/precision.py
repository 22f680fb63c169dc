"""Precision and memory layout on this machine: images/s of one process in fp32 and bf16, NCHW and NHWC.

    python benchmarks/precision.py [--rounds N] [--steps N] [--quick] [--json FILE] [--output FILE.md]

Every configuration trains the default recipe for a few steps, in interleaved rounds; the table holds medians and the
ratio to fp32 NCHW within each round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tables import document, markdown, provenance, write_json

from pipeline import load_config, train

SYSTEMS = {
    "backpropagation": ["model.modules=1"],
    "InfoPro + HPFF, K = 4": [],
}
SETTINGS = {
    "fp32 NCHW": ["precision.compute=fp32", "precision.channels_last=off"],
    "fp32 NHWC": ["precision.compute=fp32", "precision.channels_last=on"],
    "bf16 NCHW": ["precision.compute=bf16", "precision.channels_last=off"],
    "bf16 NHWC": ["precision.compute=bf16", "precision.channels_last=on"],
}


def images_per_second(assignments: list[str], steps: int) -> float:
    """Throughput of one short run in this process."""
    config = load_config(assignments=[*assignments, f"train.max_steps={steps}", "runtime.threads=1"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return train(config, run_dir=Path(folder) / "run", quiet=True)["images_per_s"]


def measure(rounds: int, steps: int) -> list[dict[str, Any]]:
    """All systems and settings, interleaved; one row each."""
    samples: dict[tuple[str, str], list[float]] = {(system, name): [] for system in SYSTEMS for name in SETTINGS}
    for _ in range(rounds):
        for system, name in samples:
            samples[system, name].append(images_per_second([*SYSTEMS[system], *SETTINGS[name]], steps))
    rows = []
    for (system, name), values in samples.items():
        base = samples[system, "fp32 NCHW"]
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        rows.append(
            {
                "system": system,
                "setting": name,
                "images_per_s": statistics.median(values),
                "low": min(values),
                "high": max(values),
                "ratio": ratio,
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown page."""
    settings = result["settings"]
    lines = [
        "# Precision and layout on a CPU",
        "",
        provenance(
            result, f"python benchmarks/precision.py --rounds {settings['rounds']} --steps {settings['steps']}"
        ),
        f"One process, one thread, ResNet-32 at 32x32, batch 32, {settings['steps']} steps a run, {settings['rounds']} "
        "interleaved rounds. Ratio: median over rounds of the ratio to fp32 NCHW in the same round.",
        "",
    ]
    cells = []
    for row in result["rows"]:
        rates = (f"{row[key]:.1f}" for key in ("images_per_s", "low", "high"))
        cells.append([row["system"], row["setting"], *rates, f"{row['ratio']:.2f}"])
    return "\n".join([*lines, markdown(["system", "setting", "images/s", "low", "high", "ratio"], cells)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=4, help="training steps of one measurement")
    parser.add_argument("--quick", action="store_true", help="one round of two steps")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument("--output", metavar="FILE.md", type=Path, help="write the result as a Markdown page")
    arguments = parser.parse_args()
    rounds, steps = (1, 2) if arguments.quick else (arguments.rounds, arguments.steps)
    result = document({"rounds": rounds, "steps": steps, "threads": 1}, measure(rounds, steps))
    print(table(result))
    if arguments.json is not None:
        write_json(arguments.json, result)
    if arguments.output is not None:
        arguments.output.write_text(table(result))


if __name__ == "__main__":
    main()
