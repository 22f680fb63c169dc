"""A text file as sequences of bytes, each with the byte behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from pipeline import ConfigError
from pipeline.base.config import Config
from pipeline.base.numerics import Numerics
from pipeline.data.text import TextSource

NUMERICS = Numerics(torch.device("cpu"), torch.float32, False)
CONTENT = bytes(range(200))  # every byte tells where it stands; the last 20 are the test set


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(CONTENT)
    return tmp_path / "text.txt"


def configured(file: Path | str, **data: object) -> Config:
    settings = {"name": "text", "root": str(file), "length": 6, "batch_size": 8, **data}
    return tiny_config("greedy", data=settings)


def test_every_byte_is_followed_by_the_next_one_and_seen_once_in_an_epoch(file: Path) -> None:
    source = TextSource(configured(file), NUMERICS)
    assert source.data_spec.train_batches == 4 and source.data_spec.train_images == 29
    firsts = []
    for epoch in (1, 2, 3):
        batches = list(source.train(epoch))
        ids, targets = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("x", "labels"))
        assert ids.shape == targets.shape == (29, 6) and ids.dtype == torch.int64
        assert torch.equal(targets, ids + 1)
        seen = ids.flatten().sort().values
        assert torch.equal(seen, torch.arange(29 * 6) + seen[0]) and int(targets.max()) < 180
        assert torch.equal(torch.cat([batch.image for batch in batches if batch.image is not None]), ids)
        firsts.append((int(seen[0]), int(ids[0, 0])))
    assert len(set(firsts)) == 3  # from another place and in another order


def test_batches_do_not_depend_on_where_an_epoch_goes_on(file: Path) -> None:
    source = TextSource(configured(file), NUMERICS)
    whole, rest = list(source.train(2)), list(source.train(2, 2))
    assert all(torch.equal(a.x, b.x) for a, b in zip(whole[2:], rest, strict=True))


def test_without_augmentation_sequences_stay_where_they_are(file: Path) -> None:
    source = TextSource(configured(file, augment="none"), NUMERICS)
    for epoch in (1, 2):
        assert {int(x[0]) % 6 for batch in source.train(epoch) for x in batch.x} == {0}


def test_the_test_set_is_the_end_of_the_file_in_order(file: Path) -> None:
    source = TextSource(configured(file, batch_size=2), NUMERICS)
    batches = list(source.test())
    assert source.data_spec.test_batches == len(batches) == 2
    assert torch.cat([batch.x for batch in batches]).flatten().tolist() == list(range(180, 198))


def test_a_short_last_batch_may_be_left_out(file: Path) -> None:
    source = TextSource(configured(file, drop_last=True), NUMERICS)
    assert [len(batch.x) for batch in source.train(1)] == [8, 8, 8] and source.data_spec.train_images == 24


@pytest.mark.parametrize(
    ("root", "data", "words"),
    [
        ("", {}, "data.name = 'text' needs a file of text; set data.root=FILE"),
        ("/nowhere/text.txt", {}, "'/nowhere/text.txt' cannot be read .No such file or directory.; give a file"),
        (None, {"length": 50}, "has 200 bytes, too few for .* of data.length = 50 and a test set; use a file"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(
    file: Path, root: str | None, data: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        TextSource(configured(file if root is None else root, **data), NUMERICS)
    assert "\n" not in str(refusal.value)
