"""The errors a user can meet. Every message is one line that names the value, the place and the fix."""

from __future__ import annotations

import difflib
import sys
import unicodedata
from collections.abc import Iterable, Iterator

MARK = "localpipe: "
"""With which every line about a failure begins."""

LONGEST_VALUE = 120  # letters of a value in a message


class LocalpipeError(Exception):
    """Base of all errors raised on purpose by this package; line breaks of a value in its message are escaped.

    Attributes:
        reported: whether it has ended a run (and not only refused a call).
    """

    reported = False

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(LocalpipeError, ValueError):
    """A configuration value, a data set or a partition that cannot work; raised before training starts."""


class InUseError(ConfigError):
    """Another job uses what this one needs: a refusal that may pass, so a launcher may try again."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used: incomplete, changed, of a newer format, or of another run."""


class WireError(LocalpipeError):
    """Two ranks disagree about what travels between them (shape, dtype, order or configuration)."""


class DataError(LocalpipeError):
    """A loader did not deliver what it had announced."""


class PeerLost(LocalpipeError):
    """A neighbouring rank closed its connection without saying goodbye."""

    def __init__(self, peer: int, message: str) -> None:
        super().__init__(message)
        self.peer = peer


class DeadlineExceeded(LocalpipeError):
    """A wait outlasted ``runtime.deadline_s``; the message says who waits for whom, for what, since when."""


class NonFiniteError(LocalpipeError):
    """A loss or a gradient of a local module is NaN or infinite.

    Such a value spreads downstream with activations and upstream with gradients, so several modules raise this for one
    cause. ``precedence`` orders them, the one where it began first: by ``step`` (0 where stages count their own), then
    losses before gradients, then losses from the first module on and gradients from the last module on.
    """

    def __init__(self, message: str, step: int, module: int, in_losses: bool) -> None:
        super().__init__(message)
        self.precedence = (step, 0, module) if in_losses else (step, 1, -module)


class MemoryExhausted(LocalpipeError):
    """A rank ran out of memory; the message says what it holds and which settings make that smaller."""


def line_of(error: BaseException) -> str:
    """What to print of ``error``: the line that a run has noted with it, which says where, or its own text."""
    if isinstance(error, LocalpipeError):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = "stopped by ctrl-C"
    else:
        text = f"{type(error).__name__}: {error}"
    return next(_notes(error), MARK + " ".join(text.split()))


def warn(text: str) -> None:
    """Tell of something that stops nothing, on one line of the error output."""
    print(f"localpipe warning: {one_line(text)}", file=sys.stderr, flush=True)


def is_noted(error: BaseException) -> bool:
    """Whether a run has noted where ``error`` has ended it."""
    return any(_notes(error))


def _notes(error: BaseException) -> Iterator[str]:
    return (note for note in getattr(error, "__notes__", ()) if note.startswith(MARK))


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return ``"did you mean 'x'?"`` for the valid name nearest to ``name``, else the list of valid names."""
    choices = sorted(valid)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return "valid names: " + ", ".join(choices)


def shown(value: object) -> str:
    """A value as a message quotes it: on one line, in letters that can be printed, at most LONGEST_VALUE of them."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out integers of more than a few thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text)} characters)"


def one_line(text: str) -> str:
    """``text`` with what would end or garble a line written as an escape: line breaks, control characters, surrogates.

    Surrogates are what Python makes of bytes in a path that are not text in the encoding of the system.
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text)
