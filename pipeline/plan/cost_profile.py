"""The cost of every local module as a file: written by a measurement, or by hand to ask "what if".

    {"format": "localpipe-profile-1", "batch_size": 64, "modules": [{"forward_s": 0.010, "backward_s": 0.02}, ...]}
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.base.errors import ConfigError, suggest
from pipeline.plan.simulate import ModuleCost

_FORMAT = "localpipe-profile-1"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float64)}


@dataclass(frozen=True)
class Profile:
    """The cost of every local module, and where it was measured.

    Attributes:
        modules: in order.
        batch_size: images of the whole batch that the seconds of a :class:`ModuleCost` are for.
        micro_batch_size: images that were worked on at a time.
        device: name of the device, for people.
        device_bytes: memory that one rank can use there; 0 = not known.
        dtype: of activations on the wire, such as "float32"; "" = not known.
        versions: name -> version of the software.
        date: ISO 8601, UTC.
        scaled_from: the smaller step whose times were measured and scaled, for people; "" = the step itself.
        work: what was measured, see :func:`pipeline.plan.profiling.work_of`; () for a profile from elsewhere.
    """

    modules: tuple[ModuleCost, ...]
    batch_size: int
    micro_batch_size: int
    device: str = ""
    device_bytes: int = 0
    dtype: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    date: str = ""
    work: tuple[str, ...] = ()
    scaled_from: str = ""

    def write(self, path: Path) -> None:
        """Write the profile as JSON."""
        document = {"format": _FORMAT, **dataclasses.asdict(self)}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Profile:
        """Read a profile. ``modules`` and ``batch_size`` are needed, times and bytes that are not given are 0.

        Raises:
            ConfigError: no such file, no JSON, an unknown name, a value that is no number >= 0.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"profile '{path}' cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"profile '{path}' is no JSON: {error}") from None
        if not isinstance(document, dict) or document.pop("format", None) != _FORMAT:
            raise ConfigError(f"profile '{path}' is no profile; it must be an object with \"format\": \"{_FORMAT}\"")
        where = f"profile '{path}'"
        _known(where, document, [f.name for f in dataclasses.fields(cls)])
        modules = document.get("modules")
        if not isinstance(modules, list) or not modules:
            raise ConfigError(f"{where} has no modules; give a list with one object for each local module")
        costs = tuple(_cost(f"{where}, module {index}", entry) for index, entry in enumerate(modules))
        batch_size = document.get("batch_size")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"{where}: batch_size = {batch_size!r} must be a number of images, 1 or more")
        found = {"micro_batch_size": batch_size, **document, "modules": costs, "work": tuple(document.get("work", ()))}
        if found.get("dtype") and found["dtype"] not in _DTYPES:
            raise ConfigError(f"{where}: dtype = {found['dtype']!r}; use one of {', '.join(_DTYPES)}")
        return cls(**found)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as PyTorch's."""
        return _DTYPES[self.dtype]

    def check(self, modules: int, batch_size: int, work: tuple[str, ...]) -> None:
        """Refuse to be used for another cut, another batch or other ``work``.

        Raises:
            ConfigError: the profile has another number of modules, another batch size, or measured something else.
        """
        for what, mine, key, wanted in (
            ("local modules", len(self.modules), "model.modules", modules),
            ("images per batch", self.batch_size, "data.batch_size", batch_size),
        ):
            if mine != wanted:
                raise ConfigError(
                    f"the profile is for {mine} {what}, the configuration has {wanted} ({key}); "
                    "profile this configuration, or change the key"
                )
        for measured, wanted_work in zip(self.work, work, strict=False):
            if measured != wanted_work:
                raise ConfigError(
                    f"the profile is of {measured}, the configuration has {wanted_work}; profile this configuration"
                )


def _cost(where: str, entry: Any) -> ModuleCost:
    if not isinstance(entry, dict):
        raise ConfigError(f'{where}: {entry!r} must be an object such as {{"forward_s": 0.01, "backward_s": 0.02}}')
    _known(where, entry, [f.name for f in dataclasses.fields(ModuleCost)])
    for name, value in entry.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if not number:
            unit = "seconds" if name.endswith("_s") else "bytes"
            raise ConfigError(f"{where}: {name} = {value!r} must be a number of {unit}, 0 or more")
    typed: dict[str, Any] = {name: int(v) if name.endswith("_bytes") else float(v) for name, v in entry.items()}
    return ModuleCost(**typed)


def _known(where: str, entries: dict[str, Any], names: list[str]) -> None:
    for name in entries:
        if name not in names:
            raise ConfigError(f"{where}: unknown name '{name}'; {suggest(name, names)}")
