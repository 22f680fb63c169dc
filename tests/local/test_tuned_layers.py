"""``precision.layers``: heads of tuned layers and of PyTorch's own, of the same weights, do the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CLASSES, METHODS, tiny_config
from torch import Tensor, nn

from pipeline import ConfigError, from_dict, load_config
from pipeline.base.config import METHODS as KNOWN
from pipeline.base.config import TUNED_LAYERS, Config
from pipeline.local.methods import Level, build_level, register_method
from pipeline.local.task import Classification
from pipeline.local.term import Term
from pipeline.models.heads import Given
from pipeline.models.layers import PointwiseConv2d, PoolTo2d
from pipeline.models.spread import whole
from pipeline.models.tuned import Tuned, use_plain

Choice = str | list[str]
MAP = (6, 8, 8)
TASK = Classification(CLASSES, (3, 16, 16))


def level(config: Config, shape: tuple[int, ...] = MAP, task: Classification = TASK) -> Level:
    """The independent level of the first of three modules, in float64 and channels last."""
    torch.manual_seed(0)
    built = build_level("independent", 0, 3, shape, task, config)
    return built.double().to(memory_format=torch.channels_last)


def configured(method: str, layers: Choice, **sections: dict[str, Any]) -> Config:
    return tiny_config(method, precision={"layers": layers}, **sections)


def tuned_in(level: Level) -> set[str]:
    return {layer.tuned for layer in level.modules() if isinstance(layer, Tuned)}


def ran(level: Level, shape: tuple[int, ...], task: Classification) -> list[Tensor]:
    """Of two steps: losses and gradient of the feature, of every parameter; and the running statistics."""
    feature = torch.randn(6, *shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    image = torch.randint(0, 256, (6, *task.image_shape), dtype=torch.uint8)
    given = Given(torch.tensor([0, 1, 2, 0, 1, 3]), image)
    found: list[Tensor] = []
    for step in range(2):
        gradient, losses = level.backward(feature * (step + 1), given, 0.3)
        found += [whole(gradient), *losses.values()]
    found += [parameter.grad for parameter in level.parameters() if parameter.grad is not None]
    assert len(found) == 2 * (1 + len(losses)) + len(list(level.parameters()))
    return [*found, *level.buffers()]


@pytest.mark.parametrize("size", [8, 6, 7])
@pytest.mark.parametrize("patches", [{"grid": 1}, {"grid": 2, "at_once": 1}, {"grid": 2, "at_once": 4}])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "predsim"])  # it has none
def test_heads_of_plain_layers_do_what_those_of_tuned_layers_do(
    method: str, patches: dict[str, int], size: int
) -> None:
    """On maps that fall apart in patches evenly and not, with images of twice the size."""
    shape, task = (6, size, size), Classification(CLASSES, (3, 2 * size, 2 * size))
    results = []
    for layers in ("tuned", "plain"):
        built = level(configured(method, layers, patches=patches), shape, task)
        results.append((built.state_dict(), ran(built, shape, task)))
    (weights, found), (other_weights, expected) = results
    assert weights.keys() == other_weights.keys()
    scale = max(float(value.double().norm()) for value in expected)  # a bias before BatchNorm has none but rounding
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        assert float((mine - other).double().norm()) <= 1e-12 * max(float(other.double().norm()), scale)


@pytest.mark.parametrize("method", METHODS)
def test_weights_do_not_depend_on_the_layers(method: str) -> None:
    states = [level(configured(method, layers)).state_dict() for layers in ("tuned", "plain", ["pooling"])]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


def test_plain_heads_have_no_tuned_layer_and_a_list_names_those_that_are() -> None:
    everything = set()
    for method in METHODS:
        used = tuned_in(level(configured(method, "tuned")))
        assert not tuned_in(level(configured(method, "plain")))
        assert not tuned_in(level(configured(method, [])))
        for name in TUNED_LAYERS:
            assert tuned_in(level(configured(method, [name]))) == used & {name}
        everything |= used
    assert everything == set(TUNED_LAYERS)


def test_heads_of_a_registered_method_follow_too() -> None:
    if "plainest" not in KNOWN:
        register_method("plainest", lambda config, task, position: [Term("task", 1.0, task.head)])
    for layers, expected in (("tuned", {"pooling"}), ("plain", set())):
        config = load_config(assignments=["method.name=plainest", f"precision.layers={layers}"])
        assert tuned_in(level(config)) == expected


def test_a_plain_layer_has_the_tensors_of_the_tuned_one() -> None:
    network = nn.Sequential(nn.Sequential(PointwiseConv2d(3, 4), PoolTo2d(2)), PointwiseConv2d(4, 2)).eval()
    before = dict(network.named_parameters())
    replaced = use_plain(network, ("pointwise",))
    assert [name for _, name, _ in replaced] == ["1", "0"]
    assert type(network[1]) is type(network[0][0]) is nn.Conv2d and isinstance(network[0][1], PoolTo2d)
    assert not any(layer.training for layer in network.modules())
    after = dict(network.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


def test_a_layer_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision.layers = 'pairs' is not known; .*paired"):
        load_config(assignments=['precision.layers=["pairs"]'])
    with pytest.raises(ConfigError, match=r"precision.layers = 'tune' is not known; .*tuned"):
        load_config(assignments=["precision.layers=tune"])
    assert from_dict({"precision": {"layers": ["paired"]}}).precision.plain_layers == set(TUNED_LAYERS) - {"paired"}
