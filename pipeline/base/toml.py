"""Configurations as TOML text: reading with the standard library, writing with tomlkit.

A configuration is text in UTF-8 whatever the locale says, so that a run directory can be moved between machines.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit

from pipeline.base.config import Config, sections, settings
from pipeline.base.errors import ConfigError, shown


@functools.lru_cache(maxsize=4)  # a run writes its own several times
def to_toml(config: Config, comments: bool = False) -> str:
    """The configuration as TOML text that :func:`load_config` reads back.

    Args:
        comments: behind every key what it means and which values are valid.
    """
    document = tomlkit.document()
    for section, entries in dataclasses.asdict(config).items():
        table = tomlkit.table()
        if comments:
            table.comment(str(sections()[section].__doc__))
        for name, value in entries.items():
            if value is None:  # TOML has no word for it: the key is left out, which means its default
                continue
            item = tomlkit.item(list(value) if isinstance(value, tuple) else value)
            if comments:
                setting = settings()[f"{section}.{name}"]
                item.comment(f"{setting.bounds.text} ({setting.valid()})")
            table.append(name, item)
        document.append(section, table)
    return tomlkit.dumps(document)


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a configuration file.

    Raises:
        ConfigError: no such file, it cannot be read, or it is not TOML; names the file and the line.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {error}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """TOML text as nested dictionaries.

    Raises:
        ValueError: it is not TOML, or nested or long beyond what Python reads.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def parse_value(text: str) -> Any:
    """A value as TOML writes it; a bare word is a string."""
    try:
        values: Mapping[str, Any] = parse_toml(f"value = {text}")
    except ValueError:
        return {"True": True, "False": False}.get(text, text)
    if list(values) != ["value"]:
        raise ConfigError(f"{shown(text)} is more than one value; use --set once for every key")
    return values["value"]
