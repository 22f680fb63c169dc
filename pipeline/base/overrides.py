"""A key that the user sets can make one that he inherited meaningless; that one gives way, and a line says so.

    --recipe cifar10-resnet32-k16-dgl-hpff --set model.modules=4
    model.cuts = 'hpff' gives way to 'auto': it has 8, 16 for resnet32, and model.modules = 4 is set

*Inherited* is what comes from a recipe, a base, a file below the one that sets the other key, or the defaults. Two keys
that do not go together and are set at the same place are an error (:mod:`pipeline.base.validation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.config import DGL_HEADS, FCN_HEAD, IMAGENET_HEAD, XCYF, Config, settings
from pipeline.base.cut_tables import TABLES, modules_of_cut
from pipeline.base.validation import value_of, with_values


@dataclass(frozen=True)
class Rule:
    """``inherited`` gives way when one of ``set_keys`` was set later and ``meaningless`` gives (replacement, why)."""

    set_keys: tuple[str, ...]
    inherited: str
    meaningless: Callable[[Config], tuple[Any, str] | None]


def give_way(config: Config, origin: Mapping[str, int]) -> tuple[Config, list[str]]:
    """Replace inherited values that a key set later has made meaningless.

    Args:
        config: types and values of all keys are valid.
        origin: key -> number of the source that set it, later sources have larger numbers; -1 or absent: the default.

    Returns:
        The configuration, and a line for every replacement.
    """
    lines = []
    for rule in RULES:
        setter = max(rule.set_keys, key=lambda key: origin.get(key, -1))
        if origin.get(setter, -1) > origin.get(rule.inherited, -1) and (found := rule.meaningless(config)):
            replacement, why = found
            old = value_of(config, rule.inherited)
            value = value_of(config, setter)
            config = with_values(config, {rule.inherited: replacement})
            lines.append(
                f"{rule.inherited} = {_text(old)} gives way to {_text(replacement)}: {why}, and {setter} = "
                f"{_text(value)} is set"
            )
    return config, lines


def _cuts(config: Config) -> tuple[str, str] | None:
    model = config.model
    if isinstance(model.cuts, tuple):
        count = len(model.cuts) + 1
        return None if model.modules == count else ("auto", f"it makes {count} local modules")
    if model.cuts not in TABLES or model.modules == 1:
        return None
    known = sorted(TABLES[model.cuts].get(model.name, {}))
    if model.modules in known:
        return None
    return "auto", f"it has {', '.join(map(str, known)) or 'no K'} for {model.name}"


def _group(config: Config) -> tuple[int, str] | None:
    model = config.model
    built = modules_of_cut(model.name, model.modules, model.cuts)
    odd = isinstance(model.group, tuple) and sum(model.group) != built
    return (1, f"the cut makes {built} local modules") if odd else None


def _modules(config: Config) -> tuple[int, str] | None:
    cuts = config.model.cuts
    if not isinstance(cuts, tuple) or config.model.modules == len(cuts) + 1:
        return None
    return len(cuts) + 1, "one local module begins at every cut"


def _span(config: Config) -> tuple[int, str] | None:
    modules = config.local_modules
    longer = config.hierarchy.cascade_span > modules > 1
    return (modules, "the largest span is K") if longer else None


def _whole_span(config: Config) -> tuple[int, str] | None:
    hierarchy, modules = config.hierarchy, config.model.modules
    shorter = hierarchy.variant == "deepsup" and hierarchy.cascade_span not in (1, modules)
    return (modules, "in deepsup every loss flows through the whole network") if shorter else None


def _head(config: Config) -> tuple[str, str] | None:
    name, head = config.method.name, config.method.head
    of_infopro = XCYF.fullmatch(head) is not None or head in (IMAGENET_HEAD, FCN_HEAD)
    valid = {
        "dgl": head in (*DGL_HEADS, FCN_HEAD),
        **dict.fromkeys(("auglocal", "deinforeg", "lopt", "predsim"), False),
        **dict.fromkeys(("greedy", "infopro", "infopro-contrast"), of_infopro),
    }
    return ("", f"it is no head of {name}") if head and not valid.get(name, True) else None


def _of_schedule(name: str, kind: str) -> Rule:
    key = f"schedule.{name}"
    default = settings()[key].default

    def meaningless(config: Config) -> tuple[int, str] | None:
        foreign = config.schedule.kind != kind and value_of(config, key) != default
        return (default, f"it belongs to '{kind}'") if foreign else None

    return Rule(("schedule.kind",), key, meaningless)


def _parts(config: Config) -> tuple[int, str] | None:
    cut = config.schedule.kind == "free" and config.schedule.micro_batches > 1
    return (1, "the replay ring holds whole batches") if cut else None


def _stages(config: Config) -> tuple[tuple[int, ...], str] | None:
    stages = config.partition.stages
    if stages and config.partition.kind != "given":
        return (), "stages belong to kind 'given'"
    if stages and sum(stages) != config.local_modules:
        return (), f"it holds {sum(stages)} modules"
    return None


def _kind_with_stages(config: Config) -> tuple[str, str] | None:
    differs = config.partition.stages and config.partition.kind != "given"
    return ("given", "stages belong to kind 'given'") if differs else None


def _kind_without_stages(config: Config) -> tuple[str, str] | None:
    lacks = config.partition.kind == "given" and not config.partition.stages
    default = settings()["partition.kind"].default
    return (default, "no stages of so many modules are given") if lacks else None


def _nesterov(config: Config) -> tuple[bool, str] | None:
    alone = config.optim.name == "sgd" and config.optim.nesterov and config.optim.momentum == 0
    return (False, "it needs momentum") if alone else None


def _error_feedback(config: Config) -> tuple[bool, str] | None:
    return (False, "it belongs to 'async'") if config.optim.error_feedback and config.schedule.kind != "async" else None


def _rules() -> Iterator[Rule]:
    yield Rule(("model.modules", "model.name"), "model.cuts", _cuts)
    yield Rule(("model.cuts",), "model.modules", _modules)
    yield Rule(("model.modules", "model.name", "model.cuts"), "model.group", _group)
    yield Rule(("model.modules", "model.cuts", "model.group"), "hierarchy.cascade_span", _span)
    yield Rule(("model.modules", "hierarchy.variant"), "hierarchy.cascade_span", _whole_span)
    yield Rule(("method.name",), "method.head", _head)
    yield from (_of_schedule(*pair) for pair in (("delay", "async"), ("ring", "free"), ("max_uses", "free")))
    yield Rule(("schedule.kind",), "schedule.micro_batches", _parts)
    yield Rule(("partition.kind", "model.modules", "model.group"), "partition.stages", _stages)
    yield Rule(("partition.stages",), "partition.kind", _kind_with_stages)
    yield Rule(("model.modules", "model.group"), "partition.kind", _kind_without_stages)
    yield Rule(("optim.momentum", "optim.name"), "optim.nesterov", _nesterov)
    yield Rule(("schedule.kind",), "optim.error_feedback", _error_feedback)


RULES = tuple(_rules())


def _text(value: object) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
