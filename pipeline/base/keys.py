"""What may stand behind a key of the configuration: its meaning, its range or its choices, stated beside the field.

    modules: int = key(4, "K, the number of local modules", at_least=1, at_most=10_000)

The statement drives the check of a value (:meth:`Setting.check`), the comments of ``--print-config`` and the table of
all keys in docs/configuration.md. Every number is finite: NaN and infinity are no value of any key.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.base.errors import ConfigError, shown, suggest

T = TypeVar("T")
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Bounds:
    """Meaning and valid values of one key.

    Attributes:
        text: what the key is, in a few words.
        low, high: the smallest and the largest number; of a list, of each entry.
        above: ``low`` itself is not valid.
        choices: the valid words; empty = any text. Methods registered later appear in it.
        entries: the valid names in a key that is, or may be, a list of names; empty = any names.
        length: of a list; 0 = any.
    """

    text: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: Sequence[str] = ()
    entries: Sequence[str] = ()
    length: int = 0


def key(
    default: T,
    text: str,
    *,
    at_least: float = -math.inf,
    above: float | None = None,
    at_most: float = math.inf,
    choices: Sequence[str] = (),
    entries: Sequence[str] = (),
    length: int = 0,
) -> T:
    """A field of a section of the configuration: its default, its meaning, and which values are valid."""
    low = at_least if above is None else above
    bounds = Bounds(text, low, at_most, above is not None, choices, entries, length)
    return dataclasses.field(default=default, metadata={"bounds": bounds})


@dataclass(frozen=True)
class Setting:
    """A key of the configuration, ``section.name``: its type as annotated, its default and its bounds."""

    name: str
    annotation: Any
    default: Any
    bounds: Bounds

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have, without None: ``(str, tuple[str, ...])`` of a union of both."""
        options = typing.get_args(self.annotation) if self._is_union else (self.annotation,)
        return tuple(option for option in options if option is not types.NoneType)

    @property
    def _is_union(self) -> bool:
        return isinstance(self.annotation, types.UnionType)

    def convert(self, value: Any) -> Any:
        """``value`` in the type of the key: an integer becomes a float where one is meant, a list a tuple.

        Raises:
            ConfigError: it has another type.
        """
        if value is None and self._is_union and types.NoneType in typing.get_args(self.annotation):
            return None
        for kind in self.kinds:
            if typing.get_origin(kind) is tuple:
                entry = typing.get_args(kind)[0]
                if isinstance(value, list | tuple) and all(_is_a(x, entry) for x in value):
                    return tuple(self._cast(x, entry) for x in value)
            elif _is_a(value, kind):
                return self._cast(value, kind)
        raise ConfigError(f"{self.name} = {shown(value)} must be {' or '.join(map(_name, self.kinds))}")

    def _cast(self, value: Any, kind: type) -> Any:
        try:
            return float(value) if kind is float else value
        except OverflowError:
            raise ConfigError(f"{self.name} = {shown(value)} {self._limit(value)}") from None

    def check(self, value: Any) -> None:
        """Refuse a value, of the right type, that is outside the bounds.

        Raises:
            ConfigError: the line names key, value and what is valid.
        """
        bounds = self.bounds
        if isinstance(value, tuple) and bounds.length not in (0, len(value)):
            raise ConfigError(f"{self.name} = {shown(list(value))} must be {bounds.length} numbers, {self.valid()}")
        for entry in value if isinstance(value, tuple) else (value,):
            whole = f"{shown(list(value))}: each" if isinstance(value, tuple) else shown(value)
            if isinstance(entry, str):
                self._check_text(entry, bounds.entries if isinstance(value, tuple) else bounds.choices)
            elif not isinstance(entry, bool) and not self._inside(entry):
                raise ConfigError(f"{self.name} = {whole} {self._limit(entry)}")

    def _inside(self, value: float) -> bool:
        """Bounds are finite, so infinity is outside; so is NaN, which is neither smaller nor larger."""
        above_low = value > self.bounds.low if self.bounds.above else value >= self.bounds.low
        return above_low and value <= self.bounds.high

    def _limit(self, value: float) -> str:
        """What a number outside the bounds should have been."""
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if value > self.bounds.high:
            return f"must be at most {number(self.bounds.high)}"
        if self.bounds.above:
            return f"must be greater than {number(self.bounds.low)}"
        return "must not be negative" if self.bounds.low == 0 else f"must be at least {number(self.bounds.low)}"

    def _check_text(self, value: str, choices: Sequence[str]) -> None:
        if choices and value not in choices:
            raise ConfigError(f"{self.name} = {shown(value)} is not known; {suggest(value, choices)}")
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ConfigError(
                f"{self.name} = {shown(value)} is not text in UTF-8, as a configuration is; give it a name that is"
            )

    def valid(self) -> str:
        """The valid values, for people: ``1 to 1,000``, ``exact | async | free``, ``true | false``."""
        bounds = self.bounds
        if bounds.choices and int not in self.kinds:
            words = " | ".join(bounds.choices)
            names = f"of {', '.join(bounds.entries)}" if bounds.entries else "of names"
            return f"{words}, or a list {names}" if len(self.kinds) > 1 else words
        if bounds.entries:
            return f"a list of {', '.join(bounds.entries)}"
        if bool in self.kinds:
            return "true | false"
        if math.isinf(bounds.high):
            return "text"
        low, high = number(bounds.low), number(bounds.high)
        numbers = f"greater than {low}, at most {high}" if bounds.above else f"{low} to {high}"
        if bounds.length and len(self.kinds) > 1:
            return f"{numbers}, or a list of {bounds.length} such numbers"
        if bounds.choices:
            return f"{' | '.join(bounds.choices)} | {numbers}"
        return f"each {numbers}" if typing.get_origin(self.kinds[0]) is tuple else numbers


def number(value: float) -> str:
    """A bound as people write it: ``1,000``, ``0.5``, ``1e-06``."""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:g}"


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is not tuple:
        return NAMES[kind]
    entry = typing.get_args(kind)[0]
    return {int: "a list of integers, for example [2, 2]", str: "a list of names"}.get(
        entry, "a list of numbers, for example [5.0, 0.5]"
    )
