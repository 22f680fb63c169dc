"""What a benchmark has measured so far, a line of JSON each: the same command goes on where it was cut off."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Kept:
    """
    Args:
        path: of the file, which is made where there is none; None: nothing is kept.
        about: what the values depend on; lines of anything else stay as they are and do not count.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self._path = path
        self._about = json.loads(json.dumps(about))
        self._known: dict[str, Any] = {}
        text = path.read_text(encoding="utf-8") if path is not None and path.is_file() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # it was being written
                continue
            if entry["about"] == self._about:
                self._known[entry["name"]] = entry["value"]
        self._cut_off = bool(text) and not text.endswith("\n")

    def value(self, name: str, measure: Callable[[], Any]) -> Any:
        """What is known under ``name``, or what ``measure`` gives now: plain data. If it fails, nothing is kept."""
        if name not in self._known:
            self._known[name] = measure()
            if self._path is not None:
                entry = json.dumps({"about": self._about, "name": name, "value": self._known[name]})
                with self._path.open("a", encoding="utf-8") as file:
                    file.write("\n" * self._cut_off + entry + "\n")
                self._cut_off = False
        return self._known[name]
