"""Recipes by inheritance: what a configuration is made of, and in which order.

    papers.toml   cifar10-resnet32-k16-dgl-hpff = {base = ["cifar10", "resnet32", "dgl", "hpff"], model.modules = 16}
                       |
    parts/        hpff-training < cifar10 < resnet32 < dgl < hpff < the line itself < --config FILE < --set KEY=VALUE

The later wins. ``base = "NAME"`` or ``base = ["NAME", "FILE.toml"]`` at the head of any of these files lays it over
recipes, parts, or other files (relative to it).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError, one_line, shown, suggest
from pipeline.base.overrides import give_way
from pipeline.base.paths import text_of
from pipeline.base.toml import parse_value, read_toml
from pipeline.base.validation import check_values, from_dict, validate

FOLDER = Path(__file__).parent.parent / "recipes"
PAPERS = "papers.toml"
FIGURES = ("test_error", "mean_iou")  # of a line of it
DEFAULT_RECIPE = "digits-resnet32-k4-infopro-hpff"

Layer = dict[str, Any]  # section -> key -> value, of one source


@dataclass(frozen=True)
class Recipe:
    """One recipe that ships with the package.

    Attributes:
        name: as ``--recipe`` takes it.
        test_error: the paper's figure, in %; None where it has none.
        mean_iou: of a segmentation, in %, in place of it.
        table: the table it stands in, for example "HPFF, table 1".
        paper: title, place and year of the paper.
    """

    name: str
    test_error: float | None = None
    mean_iou: float | None = None
    table: str = ""
    paper: str = ""


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted([*_rows(), *_shipped()])


def recipes() -> list[Recipe]:
    """The recipes that ship with the package, with the papers' figures, by name."""
    return [_rows()[name][0] if name in _rows() else Recipe(name) for name in recipe_names()]


def recipes_text() -> str:
    """One line per recipe: its name, and the paper's figure with the table it stands in."""
    rows = []
    for recipe in recipes():
        figure = "      -"
        if recipe.test_error is not None:
            figure = f"{recipe.test_error:5.2f} %  {recipe.table}"
        elif recipe.mean_iou is not None:
            figure = f"{recipe.mean_iou:5.2f} % mean IoU  {recipe.table}"
        rows.append(f"{recipe.name:46}  {figure}")
    papers = {recipe.table.partition(",")[0]: recipe.paper for recipe in recipes() if recipe.paper}
    titles = [f"{short}  {title}" for short, title in papers.items()]
    return "\n".join([*rows, "", "Test error in the paper, or mean IoU:", *titles])


def print_on_first_rank(line: str) -> None:
    """Say something that every rank would say."""
    if os.environ.get("RANK", "0") == "0":
        print(f"localpipe: {one_line(line)}", file=sys.stderr)


def load_config(
    recipe: str | None = None,
    file: Path | None = None,
    assignments: Iterable[str] = (),
    say: Callable[[str], None] = print_on_first_rank,
) -> Config:
    """Recipe, then file, then ``key=value`` assignments; later ones win. The result is resolved and validated.

    Args:
        recipe: a name of :func:`recipe_names`; the default recipe where neither this nor ``file`` is given.
        file: a TOML file, with the keys of its ``base`` below its own.
        assignments: ``section.key=value``, the value as TOML writes it, or a bare word.
        say: gets a line for every inherited value that a key set later has made meaningless and that gave way.

    Raises:
        ConfigError: unknown recipe, key or name; a value of the wrong type or out of range.
    """
    if recipe is None and file is None:
        recipe = DEFAULT_RECIPE
    layers: list[Layer] = []
    if recipe is not None:
        if recipe not in recipe_names():
            raise ConfigError(f"--recipe {recipe}: no such recipe; {suggest(recipe, recipe_names())}")
        layers += _layers(recipe, f"--recipe {recipe}", FOLDER, ())
    if file is not None:
        layers += _stack(read_toml(file), f"--config {file}", file.parent, (file.resolve(),))
    layers.append(_assigned(assignments))
    values: Layer = functools.reduce(_laid_over, layers, {})
    config = from_dict(values)
    check_values(config)
    config, lines = give_way(config, _origins(layers))
    config = validate(config)
    for line in lines:
        say(line)
    return config


@functools.cache
def _rows() -> dict[str, tuple[Recipe, Layer]]:
    """Recipe -> its figure and its line of papers.toml, whose base begins with that of the whole table."""
    rows = {}
    for table in read_toml(FOLDER / PAPERS).values():
        for name, line in table["recipes"].items():
            layer = {key: value for key, value in line.items() if key not in FIGURES}
            layer["base"] = [*_names(table["base"], PAPERS), *_names(line["base"], PAPERS)]
            figures: dict[str, Any] = {key: line.get(key) for key in FIGURES}
            rows[name] = (Recipe(name, **figures, table=table["table"], paper=table["paper"]), layer)
    return rows


def _shipped() -> dict[str, Path]:
    """The recipes that are files of their own."""
    return {path.stem: path for path in FOLDER.glob("*.toml") if path.name != PAPERS}


def _layers(name: str, place: str, folder: Path, above: tuple[str | Path, ...]) -> list[Layer]:
    """The sources of the recipe, part, or file that ``base`` at ``place`` calls ``name``, the lowest first."""
    origin: str | Path
    if name in _rows():
        values, origin, folder = _rows()[name][1], name, FOLDER
    else:
        shipped = _shipped() | {path.stem: path for path in FOLDER.glob("parts/*.toml")}
        path = folder / name if name.endswith(".toml") else shipped.get(name)
        if path is None or not path.is_file():
            valid = suggest(name, [*_rows(), *shipped])
            raise ConfigError(f"{place}: base = {shown(name)}: no such recipe or file; {valid}")
        values, origin, folder = read_toml(path), path.resolve(), path.parent
    if origin in above:
        raise ConfigError(f"{place}: base = {shown(name)} leads back to itself; remove one of the two")
    return _stack(values, name, folder, (*above, origin))


def _stack(values: Layer, place: str, folder: Path, above: tuple[str | Path, ...]) -> list[Layer]:
    """The sources below ``values`` and ``values`` itself."""
    own = {section: entries for section, entries in values.items() if section != "base"}
    below = [_layers(name, place, folder, above) for name in _names(values.get("base", []), place)]
    return [*(layer for layers in below for layer in layers), own]


def _names(base: Any, place: str) -> list[str]:
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{place}: base = {shown(base)} must be a name, or a list of names")
    return names


def _assigned(assignments: Iterable[str]) -> Layer:
    """``section.key=value`` texts as one source."""
    layer: Layer = {}
    for assignment in map(text_of, assignments):
        key, separator, text = assignment.partition("=")
        section, dot, name = key.strip().partition(".")
        if not separator or not dot:
            raise ConfigError(f"--set {assignment}: write section.key=value, for example --set train.epochs=5")
        layer = _laid_over(layer, {section: {name: parse_value(text.strip())}})
    return layer


def _laid_over(below: Layer, above: Layer) -> Layer:
    """The keys of both; those of ``above`` win."""
    merged = dict(below)
    for section, entries in above.items():
        both = isinstance(entries, Mapping) and isinstance(merged.get(section), Mapping)
        merged[section] = {**merged[section], **entries} if both else entries
    return merged


def _origins(layers: Iterable[Layer]) -> dict[str, int]:
    """Key -> number of the source that set it."""
    return {
        f"{section}.{name}": number
        for number, layer in enumerate(layers)
        for section, entries in layer.items()
        for name in entries
    }
