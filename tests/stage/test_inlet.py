"""Inlets: what a stage is given, in which steps, and what it is told to do after them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_batch

from pipeline.base.errors import DataError
from pipeline.edges.wire import Directive
from pipeline.stage.inlet import Batch, DataInlet, carried, payload, split


class Feed:
    """``count`` training batches and one test batch; remembers where an epoch began and whether it was left."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.began: list[tuple[int, int]] = []
        self.left = 0

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.began.append((epoch, start))
        try:
            yield from (tiny_batch(number) for number in range(start, self.count))
        finally:
            self.left += 1

    def test(self) -> Iterator[Batch]:
        yield tiny_batch(99, 6)


class Orders:
    """Says ``orders[step]`` after a step, else GO."""

    def __init__(self, orders: dict[int, Directive], test: Directive = Directive.GO) -> None:
        self._orders = orders
        self._test = test

    def after(self, step: int) -> Directive:
        return self._orders.get(step, Directive.GO)

    def during_test(self) -> Directive:
        return self._test


def test_an_epoch_goes_on_where_it_was_left() -> None:
    feed = Feed(5)
    inlet = DataInlet(feed, 2, Orders({14: Directive.SAVE}))
    seen = []
    for step in inlet.steps(3, first=10, began=12, end=15):
        rows = [inlet.next(3, step, part).rows for part in (0, 1)]
        seen.append((step, rows, inlet.directive))
    assert feed.began == [(3, 2)]
    assert seen == [(12, [4, 4], Directive.GO), (13, [4, 4], Directive.SAVE), (14, [4, 4], Directive.GO)]
    assert inlet.end_epoch(3, 15) == 15
    assert inlet.wait_s > 0


def test_an_epoch_that_is_left_early_leaves_the_data() -> None:
    feed = Feed(5)
    steps = DataInlet(feed, 1, Orders({})).steps(1, 0, 0, 5)
    next(steps)
    steps.close()
    assert feed.left == 1


def test_where_stages_are_at_no_common_step_orders_wait_for_the_end_of_the_epoch() -> None:
    inlet = DataInlet(Feed(5), 1, Orders({2: Directive.SAVE, 3: Directive.STOP}), at_epoch_end=True)
    seen = [(step, inlet.directive) for step in inlet.steps(1, 0, 0, 5)]
    assert seen == [(0, Directive.GO), (1, Directive.GO), (2, Directive.GO)]  # STOP ends the epoch
    assert inlet.end_epoch(1, 5) == 3
    assert inlet.directive is Directive.STOP
    assert list(inlet.steps(2, 5, 5, 7)) == [5, 6]  # a new epoch holds no old order
    assert inlet.end_epoch(2, 7) == 7 and inlet.directive is Directive.GO


def test_data_that_ends_early_is_named() -> None:
    inlet = DataInlet(Feed(1), 1, Orders({}))
    steps = inlet.steps(3, 10, 10, 12)
    assert next(steps) == 10
    with pytest.raises(DataError, match="ended in the middle of epoch 3"):
        next(steps)
    tests = inlet.tests(3, 12, 2)
    assert next(tests) == 12 and inlet.next_test(3, 12).rows == 6
    with pytest.raises(DataError, match="ended in the middle of the test"):
        next(tests)


def test_a_batch_is_cut_into_shares_that_add_up() -> None:
    batch = tiny_batch(0, 7)
    parts = list(split(batch, 3))
    assert [part.rows for part in parts] == [3, 2, 2] and {part.batch_rows for part in parts} == {7}
    assert sum(part.batch.scale for part in parts) == pytest.approx(1.0)
    assert torch.equal(torch.cat([part.batch.inputs["x"] for part in parts]), batch.x)
    assert torch.equal(torch.cat([part.batch.image for part in parts]), batch.image)


def test_named_tensors_are_cut_alike_and_travel_under_names_of_their_own() -> None:
    x, mask = torch.arange(12.0).view(6, 2), torch.arange(6) > 2
    parts = list(split(Batch({"x": x, "mask": mask}, torch.arange(6), None), 2))
    assert torch.equal(parts[1].batch.inputs["mask"], mask[3:]) and torch.equal(parts[1].batch.inputs["x"], x[3:])
    fields = payload(parts[0].batch.inputs, "activation")
    assert set(fields) == {"activation", "activation.mask"}
    assert carried(fields | {"labels": mask}, "activation").keys() == {"x", "mask"}
