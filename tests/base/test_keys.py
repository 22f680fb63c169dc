"""Every key: range and choices stand beside it, and every value is either written and read, or refused on one line."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from pipeline import Config, ConfigError, from_dict, load_config, to_toml
from pipeline.base.config import settings
from pipeline.base.keys import Bounds, Setting
from pipeline.base.validation import validate

KEYS = settings()


def numeric(setting: Setting) -> bool:
    return not {bool, str} & set(setting.kinds) and tuple[str, ...] not in setting.kinds


def test_every_numeric_key_has_a_finite_range_that_holds_its_default() -> None:
    for name, setting in KEYS.items():
        assert setting.bounds.text, name
        if numeric(setting):
            assert math.isfinite(setting.bounds.low) and math.isfinite(setting.bounds.high), name
    validate(Config())


def refusal(values: dict[str, dict[str, Any]]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(from_dict(values))
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable(), message
    message.encode()
    return message


@pytest.mark.parametrize("name", [name for name, setting in KEYS.items() if numeric(setting)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, 10**23, 10**400, -1])
def test_nan_infinity_and_what_no_machine_can_do_are_refused_by_name(name: str, value: float) -> None:
    section, _, key = name.partition(".")
    length = KEYS[name].bounds.length or 1
    given_value = [value] * length if tuple in {getattr(k, "__origin__", k) for k in KEYS[name].kinds} else value
    assert name in refusal({section: {key: given_value}})


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("optim.lr=nan", "optim.lr = nan must be a finite number"),
        ("method.temperature=nan", "method.temperature = nan must be a finite number"),
        ("method.reconstruction=[nan, 1]", "method.reconstruction = [nan, 1.0]: each must be a finite number"),
        ("runtime.deadline_s=nan", "runtime.deadline_s = nan must be a finite number"),
        ("data.cache_gib=inf", "data.cache_gib = inf must be a finite number"),
        ("optim.lr=inf", "optim.lr = inf must be a finite number"),
        ("optim.momentum=inf", "optim.momentum = inf must be a finite number"),
        ("optim.weight_decay=inf", "optim.weight_decay = inf must be a finite number"),
        ("checkpoint.every_minutes=inf", "checkpoint.every_minutes = inf must be a finite number"),
        ("runtime.setup_deadline_s=inf", "runtime.setup_deadline_s = inf must be a finite number"),
        ("runtime.deadline_s=1e308", "runtime.deadline_s = 1e+308 must be at most 2,678,400"),
        ("runtime.threads=99999999999", "runtime.threads = 99999999999 must be at most 4,096"),
        (f"data.batch_size={10**23}", f"data.batch_size = {10**23} must be at most 1,048,576"),
        ("runtime.queue_depth=99999999", "runtime.queue_depth = 99999999 must be at most 256"),
        (f"train.epochs={'9' * 9000}", "train.epochs = '9999"),  # more digits than Python reads
        (f"train.epochs=0x{'9' * 9000}", "train.epochs = a number of thousands of digits must be at most"),
        ("model.cuts=a\nb", "model.cuts = 'a\\nb' is not known"),
        ("data.root=a\0b", "data.root = 'a\\x00b' is not text in UTF-8"),
        ("data.root=\udcff", "data.root = '\\udcff' is not text in UTF-8"),
        ("model.mod\nules=1", "unknown key 'model.mod\\nules'"),
        ("no\nsense", "--set no\\nsense"),
        ("train.epochs=3\ntrain.seed=4", "is more than one value"),
        (f"train.epochs={'[' * 5000}", "train.epochs = '[[["),
    ],
)
def test_values_that_cannot_work_are_refused_on_one_line(assignment: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(assignments=[assignment])
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


ANYTHING = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.text(st.characters(), max_size=8), st.integers(10**20, 10**30),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=3), st.none(),
    st.sampled_from(["\ud83d", "\udcc3\udcbc", "a\nb", "\u2028", "\0", "🎉", "ü", "'", '"', "\\", "#", "free"]),
)  # fmt: skip


def near(setting: Setting) -> st.SearchStrategy[Any]:
    """Values in the range of a key, and its ends."""
    bounds = setting.bounds
    kind = setting.kinds[0]
    if bounds.choices:
        return st.sampled_from(list(bounds.choices))
    if bounds.entries:
        return st.lists(st.sampled_from(list(bounds.entries)), max_size=3)
    if kind is bool:
        return st.booleans()
    if kind is str:
        return st.text(max_size=8)
    if kind is int:
        small = st.integers(int(bounds.low), int(min(bounds.high, bounds.low + 8)))
        return small | st.sampled_from([int(bounds.low), int(bounds.high)])
    number = st.floats(bounds.low, bounds.high, exclude_min=bounds.above) | st.just(bounds.high)
    if kind is float:
        return number
    if kind == tuple[float, ...]:
        return st.lists(number, min_size=bounds.length, max_size=bounds.length)
    return st.lists(st.integers(int(bounds.low), int(bounds.high)), max_size=3)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for name in draw(st.lists(st.sampled_from(list(KEYS)), max_size=6, unique=True)):
        section, _, key = name.partition(".")
        values.setdefault(section, {})[key] = draw(near(KEYS[name]) if draw(st.integers(0, 4)) else ANYTHING)
    return values


@given(configurations())
@trials(max_examples=200, deadline=None, derandomize=True, database=None)
def test_what_validates_is_written_and_read_again_and_what_does_not_is_named(
    values: dict[str, dict[str, Any]],
) -> None:
    try:
        config = validate(from_dict(values))
    except ConfigError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        message.encode()
        assert any(f"{section}.{name}" in message for section, entries in values.items() for name in entries), message
        return
    for comments in (False, True):
        text = to_toml(config, comments)
        again = validate(from_dict(tomllib.loads(text)))
        assert again == config
        assert to_toml(again, comments) == text
    assert config.fingerprint()


def test_a_key_may_be_one_of_its_words_or_a_list_of_names() -> None:
    setting = Setting("model.cuts", str | tuple[str, ...], "auto", Bounds("where to cut", choices=("auto", "even")))
    assert setting.convert(["layer1", "layer2.1"]) == ("layer1", "layer2.1")
    setting.check(("layer1", "layer2.1"))
    setting.check("even")
    with pytest.raises(ConfigError, match="model.cuts = 'layer1' is not known"):
        setting.check("layer1")
    with pytest.raises(ConfigError, match="must be text or a list of names"):
        setting.convert([1, "layer1"])
    assert setting.valid() == "auto | even, or a list of names"


def test_the_names_in_a_list_may_be_given() -> None:
    bounds = Bounds("which", choices=("all", "none"), entries=("head", "trunk"))
    setting = Setting("precision.layers", str | tuple[str, ...], "all", bounds)
    setting.check(("head",))
    setting.check(())
    setting.check("none")
    for value in ("head", ("all",)):
        with pytest.raises(ConfigError, match=r"precision.layers = '\w+' is not known"):
            setting.check(value)
    assert setting.valid() == "all | none, or a list of head, trunk"


def test_a_printed_configuration_says_what_every_key_means() -> None:
    lines = to_toml(Config(), comments=True).splitlines()
    (seed,) = [line for line in lines if line.startswith("seed = ")]
    bounds = KEYS["train.seed"].bounds
    assert seed == f"seed = 0 # {bounds.text} (0 to 9,223,372,036,854,775,807)"
    written = dataclasses.asdict(Config())
    for section, entries in written.items():
        for name, value in entries.items():
            if value is not None:
                assert any(KEYS[f"{section}.{name}"].bounds.text in line for line in lines), name
