"""A user's own loaders: what they may give, in which thread they are read, and what is said of those that fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_spawn import run_ranks
from plain_images import PlainImages
from tiny import IMAGE, ROWS, STEPS, Batches, network, tiny_batch, tiny_config
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pipeline import ConfigError, LoaderData, train
from pipeline.base.errors import DataError
from pipeline.base.flow import TensorSpec
from pipeline.base.numerics import Numerics
from pipeline.data.loader_source import LoaderSource
from pipeline.data.normaliser import Normaliser

CPU32 = Numerics(torch.device("cpu"), torch.float32, channels_last=False)
IMAGES, LABELS = torch.zeros(ROWS, *IMAGE, dtype=torch.uint8), torch.zeros(ROWS, dtype=torch.int64)


def source(train_loader: Any, test_loader: Any = None) -> LoaderSource:
    return LoaderSource(LoaderData(train_loader, test_loader or Batches()), tiny_config(), CPU32)


# --- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ({"image": IMAGES, "label": LABELS}, "a dict with the keys image, label"),
        (IMAGES, "one tensor uint8 (8, 3, 8, 8)"),
        ((IMAGES, LABELS, LABELS), "a tuple of 3: uint8 (8, 3, 8, 8), int64 (8,), int64 (8,)"),
        ([IMAGES, [0] * ROWS], "a list of 2: uint8 (8, 3, 8, 8), list"),
        ("images", "a str"),
        ((IMAGES.long(), LABELS), "images int64 (8, 3, 8, 8) and labels int64 (8,)"),
        ((IMAGES, torch.zeros(ROWS, 10)), "images uint8 (8, 3, 8, 8) and labels float32 (8, 10)"),
        ((IMAGES, LABELS.float()), "images uint8 (8, 3, 8, 8) and labels float32 (8,)"),
        ((IMAGES, LABELS[:-1]), "images uint8 (8, 3, 8, 8) and labels int64 (7,)"),
    ],
)
def test_batches_that_are_no_images_and_labels_are_refused(batch: Any, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source([batch] * STEPS)
    assert str(caught.value) == (
        f"the train loader gave {what}; give (inputs, labels): images (B, C, H, W), uint8 or floating point, or ids "
        "(B, T), or a dict of named tensors with 'x' among them; and labels (B,), integers"
    )


def test_a_later_batch_is_looked_at_as_well() -> None:
    batches = source([(IMAGES, LABELS), (IMAGES[:, :, :4], LABELS)]).train(1)
    assert len(next(batches).labels) == ROWS  # the good ones come first
    with pytest.raises(ConfigError, match=r"images of shape \(3, 4, 8\) after images of shape \(3, 8, 8\); make them"):
        next(batches)
    with pytest.raises(ConfigError, match="the test loader gave a dict with the keys image;"):
        list(source(Batches(), [(IMAGES, LABELS), {"image": IMAGES}]).test())


def test_named_tensors_are_given_on_as_they_are_and_their_lengths_known() -> None:
    ids, mask, table = torch.arange(24).view(8, 3), torch.ones(8, 3, dtype=torch.bool), torch.randn(8, 5).double()
    long = torch.zeros(8, 6, dtype=torch.int64), torch.ones(8, 6, dtype=torch.bool)
    batches = [({"x": ids, "mask": mask, "table": table}, LABELS),
               ({"x": long[0], "mask": long[1], "table": table}, LABELS)]  # fmt: skip
    data = LoaderSource(LoaderData(batches, batches, max_length=6), tiny_config(), CPU32)
    assert data.data_spec.inputs == {
        "x": TensorSpec((6,), torch.int64, (0,)),
        "mask": TensorSpec((6,), torch.bool, (0,)),
        "table": TensorSpec((5,), torch.float64),
    }
    first, second = data.train(1)
    assert torch.equal(first.x["x"], ids) and first.x["mask"] is not None
    assert torch.equal(first.image, ids)  # the raw input, for heads that ask for it
    assert first.x["table"].dtype == torch.float32 and second.x["x"].shape == (8, 6)


def test_what_does_not_fit_the_batches_before_it_is_refused() -> None:
    ids, mask = torch.zeros(8, 3, dtype=torch.int64), torch.ones(8, 3, dtype=torch.bool)
    for later, what in (
        ({"x": ids}, "the train loader gave x where it is to give x, mask; name them alike in every batch"),
        ({"x": ids, "mask": mask.float()}, r"gave 'mask' float32 \(8, 3\) after 'mask' of bool; give one dtype"),
        ({"x": ids.float(), "mask": mask}, r"gave 'x' float32 \(8, 3\) after 'x' of int64; give one dtype"),
        ({"x": ids, "mask": mask[:, :2]}, r"'mask' of shape \(2,\) after 'mask' of shape \(3,\); make them equal"),
        ({"x": ids, "mask": mask[:4]}, r"x int64 \(8, 3\), mask bool \(4, 3\) and labels int64 \(8,\); give"),
    ):
        batches = source([({"x": ids, "mask": mask}, LABELS), (later, LABELS)]).train(1)
        next(batches)
        with pytest.raises(ConfigError, match=what):
            next(batches)
    with pytest.raises(ConfigError, match="max_length = 9 is for sequences, but the train loader gave images"):
        LoaderSource(LoaderData(Batches(), Batches(), max_length=9), tiny_config(), CPU32)


def test_a_loader_that_is_empty_after_all_is_refused() -> None:
    class Nothing(Batches):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(DataError, match=r"the train loader gave no batch; its len\(\) had announced 5"):
        source(Nothing())


@pytest.mark.parametrize("which", ["train", "test"])
def test_what_a_loader_raises_names_the_loader(which: str) -> None:
    class Broken(Batches):
        def __iter__(self) -> Iterator[Any]:
            yield IMAGES, LABELS
            raise KeyError("file")

    data = source(Broken(), Broken())
    batches = data.train(1) if which == "train" else data.test()
    next(batches)
    with pytest.raises(DataError, match=f"the {which} loader failed: KeyError: 'file'"):
        next(batches)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Images that come one after another, and whose number is known."""

    def __len__(self) -> int:
        return STEPS * ROWS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(STEPS * ROWS):
            batch = tiny_batch(index, 1)
            yield batch.image[0], batch.labels[0]


def test_an_iterable_data_set_with_a_length() -> None:
    data = source(DataLoader(Stream(), batch_size=ROWS))
    batches = list(data.train(1))
    assert len(batches) == data.data_spec.train_batches == STEPS and data.data_spec.train_images == len(Stream())
    assert torch.equal(torch.cat([batch.image for batch in batches]), torch.stack([image for image, _ in Stream()]))


# --- who does what ----------------------------------------------------------------------------------------------------


class Watched(Batches):
    """Notes the thread in which it is read."""

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.threads.add(threading.current_thread().name)
            yield batch


def test_the_loader_is_read_in_the_main_thread_and_normalised_ahead_in_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of four batches that are asked for, the fifth is normalised as well, and none in the thread that trains."""
    threads: list[str] = []
    enough = threading.Event()
    normalise = Normaliser.__call__

    def noted(self: Normaliser, image: Tensor) -> Tensor:
        threads.append(threading.current_thread().name)
        if len(threads) == 5:
            enough.set()
        return normalise(self, image)

    monkeypatch.setattr(Normaliser, "__call__", noted)
    loader = Watched()
    batches = source(loader).train(1)
    for step in range(4):
        batch = next(batches)
        assert torch.equal(batch.image, tiny_batch(step).image) and torch.equal(batch.labels, tiny_batch(step).labels)
    assert enough.wait(5)  # while the fourth is trained on
    assert loader.threads == {threading.main_thread().name}
    assert all(name.startswith("prefetch") for name in threads)


# --- workers that are started anew ------------------------------------------------------------------------------------


def with_a_spawned_worker(rank: int, folder: str) -> int:
    spawned = {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True}
    data = LoaderData(DataLoader(PlainImages(), batch_size=ROWS, **spawned), DataLoader(PlainImages(), batch_size=ROWS))
    config = tiny_config(modules=3, train={"epochs": 1})
    return train(config, network=network(), data=data, run_dir=Path(folder), quiet=True)["steps"]


def test_a_spawned_worker(tmp_path: Path) -> None:
    results = run_ranks(with_a_spawned_worker, 2, str(tmp_path), timeout_s=120)
    assert [result.exit_code for result in results] == [0, 0], [result.stderr for result in results]
    assert results[0].value == STEPS
