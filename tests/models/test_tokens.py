"""Heads and patches on tokens (B, T, D): those of an image stand on its grid, others are cut into parts."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tiny import CLASSES, METHODS, tiny_config
from torch import Tensor, nn

from pipeline import ConfigError
from pipeline.base.config import Config, MethodConfig
from pipeline.base.flow import TensorSpec
from pipeline.local.methods import Level, build_level
from pipeline.local.task import Classification, Task
from pipeline.models.heads import AuxiliaryHead, DecoderHead, Given, TaskHead
from pipeline.models.later import later_blocks
from pipeline.models.patches import PatchedHead, backward_together
from pipeline.models.sequence_heads import IdsHead, SequenceSimilarityHead
from pipeline.models.tokens import AsMap, InPatches, TokenGrid, reading_of

ROWS, DEPTH, IMAGE = 6, 8, (3, 16, 16)
GRID = TokenGrid(1, 4, 4)
LENGTH = 17
OTHERS: dict[str, dict[str, Any]] = {"deinforeg": {"feature_dim": 8}, "lopt": {}, "auglocal": {"depth": 1}}


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(ROWS, length, DEPTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def given(feature: Tensor) -> Given:
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(0, 256, (ROWS, *IMAGE), generator=generator, dtype=torch.uint8)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    return Given(target, image, {"x": torch.randn(feature.shape, generator=generator, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("length", "image", "grid"),
    [
        (197, (3, 224, 224), TokenGrid(1, 14, 14)),  # ViT-B/16
        (50, (3, 224, 224), TokenGrid(1, 7, 7)),  # ViT-B/32
        (261, (3, 224, 224), TokenGrid(5, 16, 16)),  # a class token and four registers, patches of 14
        (64, (3, 32, 32), TokenGrid(0, 8, 8)),
        (9, (1, 16, 32), TokenGrid(1, 2, 4)),
        (10, (3, 32, 32), None),  # 2 x 2 positions and 6 tokens in front are too many
        (300, (3, 224, 224), None),
        (197, (197,), None),  # no image
    ],
)
def test_the_grid_is_found_from_the_image(length: int, image: tuple[int, ...], grid: TokenGrid | None) -> None:
    assert TokenGrid.of((length, 768), image) == grid


def test_a_map_has_the_class_token_at_every_position() -> None:
    feature = tokens()
    found = AsMap(GRID).feature(feature)
    assert found.shape == (ROWS, DEPTH, 4, 4) and found.is_contiguous(memory_format=torch.channels_last)
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(found[:, :, row, column], feature[:, 1 + 4 * row + column] + feature[:, 0])


def test_sequences_in_patches_have_the_class_token_in_each() -> None:
    reading = InPatches(GRID, 2)
    numbers = torch.arange(LENGTH)[None, :, None]
    order = reading.feature(numbers).flatten().tolist()
    assert order[:10] == [0, 1, 2, 5, 6, 0, 3, 4, 7, 8] and len(order) == 20
    assert torch.equal(reading.output(reading.feature(numbers).double()), numbers.double())
    whole = given(tokens())
    cut = reading.given(whole)
    assert cut.inputs is not None and whole.inputs is not None and cut.target is whole.target
    assert torch.equal(cut.inputs["x"], whole.inputs["x"][:, order])


@pytest.mark.parametrize("as_map", [False, True])
def test_a_grid_that_cannot_be_cut_evenly_is_cut_unevenly_or_as_a_sequence(as_map: bool) -> None:
    reading, shape, grid = reading_of((50, 8), (3, 224, 224), 2, as_map)
    assert (reading is None) != as_map and grid == 2 and shape == ((8, 7, 7) if as_map else (50, 8))


# --- the heads of every method ----------------------------------------------------------------------------------------


def blocks() -> dict[str, nn.Module]:
    names = {"layer1": nn.Linear(DEPTH, DEPTH), "layer2": nn.Linear(DEPTH, DEPTH)}
    return {**names, "end": nn.Sequential(nn.Flatten(), nn.Linear(LENGTH * DEPTH, CLASSES))}


def level_of(config: Config, task: Task, shape: tuple[int, ...] = (LENGTH, DEPTH)) -> Level:
    specs = {name: {"x": TensorSpec(shape)} for name in ("layer1", "layer2")}
    later = later_blocks(blocks(), {"x": TensorSpec(shape)}, {**specs, "end": {"x": TensorSpec((CLASSES,))}})
    torch.manual_seed(3)
    return build_level("independent", 0, 3, shape, task, config, later[1:]).double()


def configured(method: str, n: int, at_once: int) -> Config:
    known = method if method in METHODS else "greedy"
    config = tiny_config(known, "plain", patches={"grid": n, "at_once": at_once})
    return config if method in METHODS else dataclasses.replace(config, method=MethodConfig(method, **OTHERS[method]))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_one_by_one_at_once_and_in_one_graph_are_the_same(method: str, n: int) -> None:
    """Loss, gradients of the tokens and of the heads."""
    feature, task = tokens(), Classification(CLASSES, IMAGE)
    found = []
    for at_once in (1, n * n):
        level = level_of(configured(method, n, at_once), task)
        gradient, losses = level.backward(feature, given(feature), 0.5)
        found.append((gradient, losses, [p.grad for p in level.parameters()]))
    level, leaf = level_of(configured(method, n, 1), task), feature.clone().requires_grad_()
    loss, losses = level.loss(leaf, given(feature))
    (0.5 * loss).backward()
    found.append((leaf.grad, losses, [p.grad for p in level.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)
    assert bool(found[0][0][:, 0].abs().sum() > 0)  # the class token learns, too
    scores = level.eval().logits(feature)
    assert (scores is None) == (method in ("lopt", "infopro-contrast"))
    assert scores is None or scores.shape == (ROWS, CLASSES)


def test_heads_for_maps_get_the_grid_and_heads_for_sequences_the_tokens() -> None:
    task = Classification(CLASSES, IMAGE)
    level = level_of(configured("infopro", 2, 1), task)
    heads = dict(level.heads())
    assert all(head.reading == AsMap(GRID) and head.grid == 2 for head in heads.values())
    assert isinstance(heads["reconstruction"].first, DecoderHead)
    assert isinstance(heads["task"].first, TaskHead) and isinstance(heads["task"].first.head[0], nn.Conv2d)
    ((_, head),) = level_of(configured("lopt", 2, 1), task).heads()
    assert head.reading == InPatches(GRID, 2) and head.grid == 4


def test_a_patch_of_tokens_reconstructs_its_patch_of_the_image() -> None:
    level = level_of(configured("infopro", 2, 4), Classification(CLASSES, IMAGE))
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(AuxiliaryHead):
        asks = frozenset({"image"})

        def loss(self, feature: Tensor, given: Given) -> Tensor:
            assert given.image is not None
            seen.append((feature.detach(), given.image))
            return feature.square().mean()

    feature, its = tokens(), given(tokens())
    assert its.image is not None
    PatchedHead(Watching, 2, reading=dict(level.heads())["reconstruction"].reading).backward(feature, its, 1.0)
    whole = AsMap(GRID).feature(feature)
    for index, (patch, image) in enumerate(seen):
        row, column = divmod(index, 2)
        assert torch.equal(patch, whole[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2])
        assert torch.equal(image, its.image[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8])


@pytest.mark.parametrize("method", ["infopro", "predsim", "dgl"])
def test_two_levels_at_once_are_one_after_the_other(method: str) -> None:
    feature, its = tokens(), given(tokens())
    levels = [level_of(configured(method, 2, 4), Classification(CLASSES, IMAGE)) for _ in range(2)]
    for other in levels[1].parameters():
        nn.init.normal_(other, std=0.1)
    for name, head in levels[0].heads():
        pair = [head, dict(levels[1].heads())[name]]
        assert head.like(pair[1]) and head.groups(feature, its)
        apart = [copy.deepcopy(one).backward(feature, its, 0.7) for one in pair]
        together = backward_together(pair, feature, its, [0.7, 0.7], [None, None])
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-12)


# --- sequences that are no image --------------------------------------------------------------------------------------


def test_ids_are_reconstructed_by_cross_entropy() -> None:
    class Words(Classification):
        vocabulary = 11

    level = level_of(configured("infopro", 2, 1), Words(CLASSES, (LENGTH,)))
    head = dict(level.heads())["reconstruction"]
    assert isinstance(head.first, IdsHead) and head.reading is None
    feature, ids = tokens(), torch.randint(11, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    _, loss = head.backward(feature, Given(torch.zeros(ROWS), ids), 1.0)
    scores = (feature @ head.first.decoder.weight.T + head.first.decoder.bias).log_softmax(dim=-1)
    each = -scores.gather(2, ids[..., None]).squeeze(2)
    expected = (each[:, :8].mean() + each[:, 8:].mean()) / 2  # two parts, of 8 and of 9
    torch.testing.assert_close(loss, expected.detach())


def test_predsim_compares_the_deviation_over_tokens() -> None:
    level = level_of(configured("predsim", 1, 1), Classification(CLASSES, (LENGTH,)))
    head = dict(level.heads())["similarity"].first
    assert isinstance(head, SequenceSimilarityHead)
    feature, target = tokens(), torch.tensor([0, 1, 2, 3, 0, 1])
    found = head.loss(feature, Given(target)).detach()
    x = (feature @ head.linear.weight.T).std(dim=1)
    wanted = torch.eye(CLASSES, dtype=torch.float64)[target]

    def similarity(rows: Tensor) -> Tensor:
        return torch.corrcoef(rows)

    torch.testing.assert_close(found, (similarity(x) - similarity(wanted)).square().mean().detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [1, 2])
def test_a_head_with_a_layer_norm_takes_parts_at_once(count: int) -> None:
    def make() -> TaskHead:
        head = TaskHead(nn.Sequential(nn.LayerNorm(DEPTH), nn.Linear(DEPTH, 5)), per_token).double()
        nn.init.normal_(head.head[0].weight)
        return head

    feature, target = tokens(12), torch.randint(5, (ROWS, 12), generator=torch.Generator().manual_seed(5))
    heads = [PatchedHead(make, 3, at_once=3) for _ in range(count)]
    assert heads[0].groups(feature, Given(target))
    at_once = backward_together(heads, feature, Given(target), [1.0] * count, [None] * count)
    gradients = [[p.grad for p in head.parameters()] for head in heads]
    for head in heads:
        head.zero_grad()
        head.at_once = 1
    one_by_one = [head.backward(feature, Given(target), 1.0) for head in heads]
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-9, atol=1e-12)
    again = [[p.grad for p in head.parameters()] for head in heads]
    torch.testing.assert_close(gradients, again, rtol=1e-9, atol=1e-12)


def per_token(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Classification(CLASSES, (3, 10, 10)), "tokens on a grid of squares of the image, but a local module ends in"),
        (Classification(CLASSES, (LENGTH,)), r"'infopro' reconstructs images, or ids of a known number, but .*\(17,\)"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused_in_one_line(task: Task, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        level_of(configured("infopro", 1, 1), task)
    assert "\n" not in str(refusal.value)


