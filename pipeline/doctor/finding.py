"""What the doctor has found, a line each, and what follows from all of it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    """worth knowing"""
    WARNING = "warning"
    """training works, and is slow or may end early"""
    ERROR = "error"
    """training would not work"""


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        subject: what was looked at, as ``"shared memory"``.
        text: what was found there.
        fix: what to do about it; empty where nothing is to be done.
        node: whose; empty where there is one node, or for all ranks together.
    """

    subject: str
    level: Level
    text: str
    fix: str = ""
    node: str = ""

    def __str__(self) -> str:
        where = f"{self.node}: " if self.node else ""
        return f"{self.subject}: {where}{self.text}" + (f"; {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class PairTimes:
    """How ranks ``upper`` and ``upper`` + 1 reach each other, as the edges of training do.

    Attributes:
        crosses: whether they are on two machines.
        latency_s: of a small message, one way: the median of half a round trip.
        down_bytes, up_bytes: of one message of the check: to the next rank, and back.
        down_bytes_per_s, up_bytes_per_s: while one message follows the other.
    """

    upper: int
    crosses: bool
    latency_s: float
    down_bytes: int
    up_bytes: int
    down_bytes_per_s: float
    up_bytes_per_s: float


@dataclass(frozen=True)
class ClockSkew:
    """How far the wall clock of ``rank`` is ahead of rank 0's: ``ahead_s``, known to ``error_s`` seconds."""

    rank: int
    ahead_s: float
    error_s: float


@dataclass(frozen=True)
class Diagnosis:
    """All findings in the order in which they were told, and the numbers behind those about several ranks."""

    ranks: int
    findings: tuple[Finding, ...]
    pairs: tuple[PairTimes, ...] = ()
    clocks: tuple[ClockSkew, ...] = ()

    @property
    def fit(self) -> bool:
        """Whether training would work."""
        return all(finding.level is not Level.ERROR for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One line: fit or not, and because of what."""
        counts = Counter(finding.level for finding in self.findings)
        found = ", ".join(
            f"{counts[level]} {level}{'s' if counts[level] > 1 and level is not Level.OK else ''}"
            for level in Level
            if counts[level]
        )
        worst = max(self.findings, key=lambda finding: list(Level).index(finding.level))
        why = f": {worst}" if not self.fit else ""
        return f"{'fit' if self.fit else 'not fit'} to train ({found}){why}"

    def write_json(self, path: Path) -> None:
        """Write everything. Raises ConfigError where the disk refuses."""
        document: dict[str, Any] = {"fit": self.fit, "verdict": self.verdict, **dataclasses.asdict(self)}
        try:
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be written ({error.strerror}); choose another place") from error


def size(nbytes: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
