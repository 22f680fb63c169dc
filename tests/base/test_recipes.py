"""Recipes by inheritance: all names of before give what they gave, and a file can lie on top of others."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from pipeline import ConfigError, load_config, recipe_names, recipes_text
from pipeline.base.recipes import recipes

BEFORE = json.loads((Path(__file__).parent / "recipes_before_inheritance.json").read_text())
DEFAULTS_SINCE = {"partition": {"kind": "auto"}}
OF_CIFAR = re.compile(r"(cifar10|stl10|svhn)-.*-infopro-hpff(-released)?")
"""Their last local module with a head had a loss of weight 0, and no other that reached it."""
RECIPES_SINCE = {"digits-resnet32-k4-infopro-hpff": {"model": {"cuts": "cost"}}}


def test_every_recipe_resolves_to_what_it_was_as_a_file_of_its_own() -> None:
    """Recorded when each of the 97 was one file: the defaults, and what every recipe had otherwise."""
    assert set(BEFORE["recipes"]) <= set(recipe_names()) and len(BEFORE["recipes"]) == 97
    for name, changes in BEFORE["recipes"].items():
        now = json.loads(json.dumps(dataclasses.asdict(load_config(name, say=pytest.fail))))
        for section, entries in BEFORE["defaults"].items():
            expected = {**entries, **DEFAULTS_SINCE.get(section, {}), **changes.get(section, {})}
            expected |= RECIPES_SINCE.get(name, {}).get(section, {})
            expected |= {"final_loss": "cascade"} if section == "hierarchy" and OF_CIFAR.fullmatch(name) else {}
            assert {key: now[section][key] for key in expected} == expected, (name, section)


def test_recipes_show_the_figure_of_the_paper_and_where_it_stands() -> None:
    known = {recipe.name: recipe for recipe in recipes()}
    hpff = known["cifar10-resnet32-k16-dgl-hpff"]
    assert (hpff.test_error, hpff.table) == (8.94, "HPFF, table 1")
    assert "Hierarchical Locally Supervised Learning" in hpff.paper
    assert known["digits-resnet32-k4-infopro-hpff"].test_error is None
    scenes = known["cityscapes-deeplabv3-resnet101-k2-infopro"]
    assert (scenes.test_error, scenes.mean_iou, scenes.table) == (None, 79.37, "InfoPro, Cityscapes")
    rows = recipes_text().splitlines()
    assert [row.split()[0] for row in rows[: len(known)]] == recipe_names()
    assert "cifar10-resnet110-k2-infopro-contrast            6.42 %  InfoPro, table 2" in rows
    assert "cityscapes-deeplabv3-resnet101-k2-infopro       79.37 % mean IoU  InfoPro, Cityscapes" in rows


def test_a_file_lies_on_a_recipe_and_on_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "machine.toml").write_text("[runtime]\nthreads = 3\n[train]\nseed = 1\n")
    mine = tmp_path / "mine.toml"
    mine.write_text('base = ["cifar10-resnet32-k16-dgl-hpff", "machine.toml"]\n[train]\nseed = 2\n')
    config = load_config(file=mine)
    assert (config.model.modules, config.runtime.threads, config.train.seed) == (16, 3, 2)
    assert load_config("cifar10-resnet32-bp", mine).model.modules == 16  # the file with its base lies on --recipe
    parts = tmp_path / "parts.toml"
    parts.write_text('base = "predsim"\n')
    assert load_config(file=parts).method.name == "predsim"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('base = "cifar10-resnet32-k16-dgl-hpf"', ["mine.toml", "did you mean 'cifar10-resnet32-k16-dgl-hpff'?"]),
        ('base = "absent.toml"', ["mine.toml", "'absent.toml'", "no such recipe or file"]),
        ('base = "mine.toml"', ["mine.toml", "leads back to itself"]),
        ('base = "other.toml"', ["other.toml: base = 'mine.toml' leads back to itself"]),
        ("base = 3", ["base = 3 must be a name, or a list of names"]),
        ('base = "papers"', ["base = 'papers'", "no such recipe"]),
        ('base = "a\\nb"', ["base = 'a\\nb'", "no such recipe"]),
    ],
)
def test_a_base_that_cannot_work_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "mine.toml").write_text(text)
    (tmp_path / "other.toml").write_text('base = "mine.toml"')
    with pytest.raises(ConfigError) as caught:
        load_config(file=tmp_path / "mine.toml")
    assert len(str(caught.value).splitlines()) == 1
    assert all(word in str(caught.value) for word in words), caught.value
