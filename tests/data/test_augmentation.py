"""Augmentation: a function of (seed, epoch, sample) alone, and really crops and flips."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data import Augmentation, augment
from pipeline.data.augmentation import hashed

CIFAR = Augmentation(4, "reflect", flip=True)
MODES = [CIFAR, Augmentation(2, "zeros", flip=False), Augmentation(3, "zeros", flip=True)]
WORD = (1 << 64) - 1


def images(count: int, height: int = 12, width: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def run(
    batch: Tensor, indices: Tensor, policy: Augmentation = CIFAR, seed: int = 5, epoch: int = 2
) -> Tensor:
    return augment(batch, indices, seed=seed, epoch=epoch, policy=policy)


@pytest.mark.parametrize("policy", MODES)
def test_a_sample_does_not_depend_on_its_batch(policy: Augmentation) -> None:
    batch, indices = images(64), torch.arange(1000, 1064)
    whole = run(batch, indices, policy)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    assert torch.equal(run(batch[order], indices[order], policy), whole[order])
    assert torch.equal(run(batch[7:8], indices[7:8], policy), whole[7:8])
    assert whole.dtype == torch.uint8 and whole.shape == batch.shape


def test_seed_epoch_and_sample_each_matter() -> None:
    batch, indices = images(64), torch.arange(64)
    whole = run(batch, indices)

    assert torch.equal(run(batch, indices), whole)
    for other in (run(batch, indices, epoch=3), run(batch, indices, seed=6), run(batch, indices + 64)):
        changed = (other != whole).flatten(1).any(dim=1).float().mean()
        assert changed > 0.9


@pytest.mark.parametrize("policy", MODES)
def test_every_result_is_a_crop_of_the_padded_image(policy: Augmentation) -> None:
    batch, pad = images(40), policy.padding
    height, width = batch.shape[2:]
    mode = "reflect" if policy.padding_mode == "reflect" else "constant"
    padded = F.pad(batch.float(), (pad, pad, pad, pad), mode=mode).to(torch.uint8)
    seen = set()

    for source, result in zip(padded, run(batch, torch.arange(40), policy), strict=True):
        matches = [
            (top, left, flipped)
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for flipped in (False, True)
            if torch.equal(
                result.flip(2) if flipped else result, source[:, top : top + height, left : left + width]
            )
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert {flipped for _, _, flipped in seen} == ({False, True} if policy.flip else {False})
    assert len({top for top, _, _ in seen}) == len({left for _, left, _ in seen}) == 2 * pad + 1


def test_offsets_and_flips_are_uniform_and_independent() -> None:
    # Channel 0 holds the row numbers and channel 1 the column numbers: the crop can be read off.
    count, pad = 9000, 1
    rows = torch.arange(6).view(6, 1).expand(6, 6)
    batch = torch.stack([rows, rows.T]).to(torch.uint8).expand(count, 2, 6, 6)
    result = run(batch, torch.arange(count), Augmentation(pad, "zeros", flip=True)).long()
    top = result[:, 0, 2, 2] - 1
    flipped = result[:, 1, 2, 2] > result[:, 1, 2, 3]
    left = torch.where(flipped, result[:, 1, 2, 3], result[:, 1, 2, 2]) - 1
    cells = torch.bincount((top * 3 + left) * 2 + flipped, minlength=18).double()

    expected = count / 18
    assert ((cells - expected) ** 2 / expected).sum() < 45  # chi-squared, 17 degrees of freedom: p = 0.0002


def test_no_policy_changes_nothing() -> None:
    batch = images(8)

    assert torch.equal(run(batch, torch.arange(8), Augmentation()), batch)


def test_the_hash_is_splitmix64_in_plain_integers() -> None:
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
        return x ^ (x >> 31)

    def expected(x: int, *keys: int) -> int:
        for key in keys:
            x = mix((x + (key + 1) * 0x9E3779B97F4A7C15) & WORD)
        return mix(x) >> 1

    indices = [0, 1, 2, 49_999, 1_281_166]
    for keys in ((0, 0, 0), (5, 2, 1), (2**31, 399, 2)):
        assert hashed(torch.tensor(indices), *keys).tolist() == [expected(i, *keys) for i in indices]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", MODES)
def test_a_gpu_gives_the_same_pixels(policy: Augmentation) -> None:
    batch, indices = images(64), torch.arange(64)
    result = run(batch.cuda(), indices, policy)

    assert result.is_cuda and torch.equal(result.cpu(), run(batch, indices, policy))
