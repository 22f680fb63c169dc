"""The configuration: what is accepted, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.base.errors import ConfigError
from pipeline.base.recipes import load_config, recipe_names
from pipeline.base.toml import to_toml
from pipeline.base.validation import from_dict, validate


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nepochs = 7\nseed = 3\n")
    config = load_config(file=file, assignments=["train.epochs=9"])
    assert (config.train.epochs, config.train.seed) == (9, 3)


def test_every_recipe_is_valid_and_survives_a_round_trip(tmp_path: Path) -> None:
    assert recipe_names()
    for name in recipe_names():
        config = load_config(name)
        file = tmp_path / f"{name}.toml"
        file.write_text(to_toml(config))
        assert load_config(file=file) == config, name


def test_values_are_toml_and_bare_words_are_text() -> None:
    config = load_config(
        assignments=["method.reconstruction=[2, 0.5]", "data.name=folder", "optim.lr=1", "data.download=true"]
    )
    assert config.method.reconstruction == (2.0, 0.5)
    assert (config.data.name, config.optim.lr, config.data.download) == ("folder", 1.0, True)


def test_common_spellings_of_precision_are_understood() -> None:
    assert load_config(assignments=["precision.compute=float32"]).precision.compute == "fp32"
    assert load_config(assignments=["precision.compute=bf16"]).precision.compute == "bf16"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.epoch=3", ["train.epoch", "did you mean 'train.epochs'?"]),
        ("trian.epochs=3", ["trian", "did you mean 'train'?"]),
        ("method.name=dlg", ["method.name = 'dlg'", "did you mean 'dgl'?"]),
        ("schedule.kind=exakt", ["schedule.kind = 'exakt'", "did you mean 'exact'?"]),
        ("train.epochs=many", ["train.epochs = 'many'", "an integer"]),
        ("train.epochs=0", ["train.epochs = 0", "at least 1"]),
        ("train.epochs=true", ["train.epochs", "an integer"]),
        ("hierarchy.cascade_weight=-0.5", ["hierarchy.cascade_weight = -0.5", "negative"]),
        ("method.task=[1]", ["method.task = [1.0]", "2 numbers"]),
        ("method.task=[1, -1]", ["method.task = [1.0, -1.0]", "negative"]),
        ("schedule.micro_batches=3", ["data.batch_size", "not divisible", "micro_batches = 3"]),
        ("hierarchy.cascade_span=9", ["hierarchy.cascade_span = 9", "model.modules = 4"]),
        ("optim.momentum=0 optim.nesterov=true", ["optim.momentum = 0", "optim.nesterov=false"]),
        ("optim.lr=0", ["optim.lr = 0", "greater than 0"]),
        ("nonsense", ["--set nonsense", "section.key=value"]),
    ],
)
def test_bad_assignments_are_refused_on_one_line(assignment: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(assignments=[assignment] if "[" in assignment else assignment.split())
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_unknown_recipes_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        load_config("digit")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(file=tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(ConfigError, match="broken.toml"):
        load_config(file=broken)


def test_level_weights_default_to_the_variant() -> None:
    paper = validate(from_dict({"hierarchy": {"cascade_span": 2}})).hierarchy
    released = validate(from_dict({"hierarchy": {"cascade_span": 2, "variant": "released"}})).hierarchy
    assert (paper.independent_weight, paper.cascade_weight) == (1.0, 1.0)
    assert (released.independent_weight, released.cascade_weight) == (0.001, 0.999)


def test_the_fingerprint_sees_every_key_but_the_runtime() -> None:
    base = load_config()
    assert load_config(assignments=["train.seed=1"]).fingerprint() != base.fingerprint()
    assert load_config(assignments=["runtime.threads=1"]).fingerprint() == base.fingerprint()
