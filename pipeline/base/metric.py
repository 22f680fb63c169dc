"""How a metric reads: its name in files, and its title, unit and direction for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricForm:
    """What a reader must know of a metric beside its values; plain data, so that records can carry it.

    Attributes:
        name: key in files, such as "error_pct".
        title: for people, such as "error".
        unit: behind the number, such as "%".
        digits: behind the point.
        better: whether a lower or a higher number is better.
    """

    name: str
    title: str
    unit: str = ""
    digits: int = 2
    better: Literal["lower", "higher"] = "lower"

    @property
    def direction(self) -> str:
        """``higher is better``."""
        return f"{self.better} is better"

    @property
    def heading(self) -> str:
        """``error %``, above numbers without it."""
        return f"{self.title} {self.unit}".rstrip()

    def number(self, value: float | None) -> str:
        """``5.21``; "-" where nothing was measured."""
        return "-" if value is None else f"{value:.{self.digits}f}"

    def text(self, value: float | None) -> str:
        """``5.21 %``."""
        return f"{self.number(value)} {self.unit}".rstrip()


ERROR = MetricForm("error_pct", "error", "%")
"""Share of the rows that get the wrong class, in percent. It has keys of its own in files."""
