"""Write the weights of a checkpoint as one file for the un-cut network.

    python launch/export.py runs/mine --output mine.pt                     the newest valid checkpoint of a run
    python launch/export.py runs/mine/checkpoints/step-00000800 --output mine.safetensors --heads
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pipeline


def main() -> int:
    return pipeline.command(_export)


def _export() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN", type=Path, help="a step directory, or a run directory")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="a new .pt, .pth or .safetensors")
    parser.add_argument("--heads", action="store_true", help="add the auxiliary heads (heads.module0. ...)")
    parser.add_argument("--format", choices=("pt", "safetensors"), help="default: as the name of the file says")
    arguments = parser.parse_args()
    print(pipeline.export(arguments.source, arguments.output, heads=arguments.heads, fmt=arguments.format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
