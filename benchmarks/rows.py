"""Rows of the papers' tables by name, what they are made of, and what the papers report.

    cifar10-resnet32-k16-dgl-hpff                     a recipe
    cifar10-resnet32-k16-dgl-hilo                     a recipe with something else at its end (ENDINGS)
    cifar10-resnet32-k4-dgl-hpff                      a recipe with another K
    cifar10-resnet32-k16-dgl-hpff,optim.lr=0.2        any of these with more keys
    hpff-table-1, hpff, ablation, local-to-global     many of them (groups)
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import Config, ConfigError, load_config, recipe_names, recipes

PAPERS = Path(__file__).with_name("papers.toml")
ENDINGS: dict[str, tuple[str, list[str], str]] = {
    "-hilo": ("-hpff", ["patches.grid=1"], " + cascade"),
    "-cascade": ("-hpff", ["patches.grid=1", "hierarchy.independent_weight=0"], ", cascade only"),
    "-patches": ("", ["patches.grid=2"], " + patches"),
    "-deepsup": ("", ["hierarchy.variant=deepsup"], " losses on BP (DeepSup)"),
    "-man": ("", ["method.front=man"], " + MAN"),
    "-hpff-released": ("-hpff", ["hierarchy.variant=released"], " + HPFF, released"),
    "-hpff": ("-hpff", [], " + HPFF"),
}
"""Ending of a name: that of its recipe, more keys, and what it is called."""
_RESNET32 = "cifar10-resnet32-"
OF_HPFF = tuple(
    f"{_RESNET32}{name}"
    for name in (
        "bp", "k16-dgl", "k16-dgl-hilo", "k16-dgl-patches", "k16-dgl-hpff", "k16-dgl-deepsup", "k16-dgl-cascade",
        "k4-dgl", "k4-dgl-hilo", "k4-dgl-hpff", "k16-infopro", "k16-infopro-man", "k16-infopro-hilo",
        "k16-infopro-hpff-released", "k16-infopro-hpff", "k4-infopro", "k4-infopro-hpff",
    )
)  # fmt: skip
"""HPFF's tables 1, 4 and 5 for one network, the cheap ones first."""
ABLATION = tuple(
    f"{_RESNET32}k16-{name}"
    for name in (
        "dgl-patches,patches.statistics=shared", "dgl-hpff,patches.statistics=shared",
        "dgl-hilo,hierarchy.independent_weight=0.5,hierarchy.cascade_weight=0.5",
        "dgl-hilo,hierarchy.independent_weight=0.001,hierarchy.cascade_weight=0.999",
        "dgl-hilo,optim.head_lr=0.25", "dgl-hilo,optim.head_lr=4", "infopro-hpff,patches.heads=reconstruction",
    )
)  # fmt: skip
"""Parts of HPFF one by one: BatchNorm of patches, weights of levels, learning rate of heads, heads on patches."""
METHODS = {"dgl": "DGL", "infopro": "InfoPro", "infopro-contrast": "InfoPro, contrast", "predsim": "PredSim",
           "greedy": "Greedy", "auglocal": "AugLocal"}  # fmt: skip
BP = "BP"


@dataclass(frozen=True)
class TableRow:
    """One row of a table of errors.

    Attributes:
        name: as above.
        title: for people, without data and network: ``DGL + HPFF``.
        recipe, keys: what it is made of.
        published: error and standard deviation (None: not given), %, with the table it stands in.
    """

    name: str
    title: str
    recipe: str
    keys: tuple[str, ...]
    published: tuple[tuple[float, float | None, str], ...] = ()

    @property
    def group(self) -> str:
        """Data set and network, which have one backpropagation."""
        return re.split(r"-bp$|-k\d+-", self.name.partition(",")[0])[0]

    def config(self, assignments: Sequence[str] = ()) -> Config:
        """The configuration; ``assignments`` go before the row's own keys."""
        return load_config(self.recipe, assignments=[*assignments, *self.keys])


def expanded(names: Sequence[str]) -> list[str]:
    """The names with groups in place, each once: ``hpff-table-1`` (any table of which there are recipes), ``hpff``,
    ``ablation``, and ``local-to-global``, DGL with K = 2, 4, 8, 16 and cascades of k = 1 ... K modules."""
    groups = {"hpff": list(OF_HPFF), "ablation": list(ABLATION), "local-to-global": local_to_global()}
    for recipe in recipes():
        if recipe.table:
            groups.setdefault(recipe.table.lower().replace(", ", "-").replace(" ", "-"), []).append(recipe.name)
    return list(dict.fromkeys(row for name in names for row in groups.get(name, [name])))


def local_to_global(start: str = "cifar10-resnet32") -> list[str]:
    """From plain local learning to a gradient that flows through everything, and backpropagation."""
    names = [f"{start}-bp"]
    for modules in (2, 4, 8, 16):
        names.append(f"{start}-k{modules}-dgl")
        names += [
            f"{start}-k{modules}-dgl-hilo" + (f",hierarchy.cascade_span={span}" if span > 2 else "")
            for span in (2, 4, 8, 16) if span <= modules
        ]  # fmt: skip
    return names


def row_of(name: str) -> TableRow:
    """The row of a name.

    Raises:
        ConfigError: no recipe is behind it.
    """
    plain, *given = name.split(",")
    more = [assignment for assignment in given if assignment]
    ending = next((end for end in ENDINGS if plain.endswith(end)), "")
    below, keys, suffix = ENDINGS.get(ending, ("", [], ""))
    stem = plain.removesuffix(ending)
    found = re.fullmatch(r"(.+)-k(\d+)-(.+)", stem)
    title = BP if found is None else METHODS.get(found[3], found[3]) + suffix
    recipe, other = _recipe_of(name, stem + below)
    keys = [*other, *keys, *more]
    said = [assignment.replace("hierarchy.cascade_span=", "k = ") for assignment in more]
    return TableRow(name, ", ".join([title, *said]), recipe, tuple(keys), tuple(_published(name)))


def _recipe_of(name: str, wanted: str) -> tuple[str, list[str]]:
    """The recipe, and what makes it that of another K."""
    found = re.fullmatch(r"(.+)-k(\d+)-(.+)", wanted)
    if wanted in recipe_names():
        return wanted, []
    if found is not None:
        start, modules, end = found.groups()
        alike = re.compile(rf"{re.escape(start)}-k\d+-{re.escape(end)}")
        same = [recipe for recipe in recipe_names() if alike.fullmatch(recipe)]
        keys = [f"model.modules={modules}", "model.cuts=auto"]
        if same:
            return max(same, key=_modules), keys
        if end in METHODS:  # a method that no recipe of this network has: that of DGL with another name
            return _recipe_of(name, f"{start}-k{modules}-dgl")[0], [*keys, f"method.name={end}", "method.head="]
    raise ConfigError(
        f"--rows {name}: no recipe is behind it; a recipe (launch/train.py --list-recipes), one with another K, or one "
        f"that ends in {', '.join(ENDINGS)}"
    )


def _modules(recipe: str) -> int:
    found = re.search(r"-k(\d+)-", recipe)
    return int(found[1]) if found else 1


def _published(name: str) -> Iterator[tuple[float, float | None, str]]:
    for recipe in recipes():
        if recipe.name == name and recipe.test_error is not None:
            yield recipe.test_error, None, recipe.table
    for table in papers("errors"):
        if name in table:
            value = table[name]
            mean, spread = value if isinstance(value, list) else (value, None)
            yield mean, spread, table["source"]


@cache
def papers(kind: str) -> list[dict[str, Any]]:
    """The tables of papers.toml, "errors" or "memory"."""
    tables: list[dict[str, Any]] = tomllib.loads(PAPERS.read_text(encoding="utf-8"))[kind]
    return tables
