"""What the doctor has found, a line each: how much it matters, what was looked at, what there is, what to do."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from pipeline.doctor.finding import Diagnosis, Finding, Level
from pipeline.report.console import output_console

STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.ERROR: "bold red"}
WIDTHS = (8, 14)
"""Columns of level and subject."""


def show_finding(finding: Finding, console: Console | None = None) -> None:
    """Print one line on ``console`` (default: standard output)."""
    line = Text(f"{finding.level:<{WIDTHS[0]}}", style=STYLES[finding.level])
    line.append(f"{finding.subject:<{WIDTHS[1]}}", style="bold")
    line.append(f"{finding.node}: " if finding.node else "", style="")
    line.append(finding.text, style="")
    line.append(f"; {finding.fix}" if finding.fix else "", style="italic")
    output_console(console).print(line, soft_wrap=True, highlight=False)


def show_verdict(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print the last line."""
    style = "bold green" if diagnosis.fit else "bold red"
    output_console(console).print(Text(diagnosis.verdict, style=style), soft_wrap=True, highlight=False)
