"""Centred kernel alignment of representations, estimated without bias from minibatches.

    HSIC_1(K, L) = [tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n(n-3)),   K, L with zero diagonals
    CKA = mean HSIC_1(K, L) / sqrt(mean HSIC_1(K, K) mean HSIC_1(L, L))               means over minibatches

K = X X' for features X (n, d) of n images. Kornblith et al., Similarity of Neural Network Representations Revisited,
ICML 2019 (CKA); Song et al., Feature Selection via Dependence Maximization, JMLR 2012 (HSIC_1); Nguyen, Raghu and
Kornblith, Do Wide and Deep Networks Learn the Same Things?, ICLR 2021 (minibatches). Each batch's estimate is unbiased,
so the result does not depend on the size of the batches, but for noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def gram(features: Tensor) -> Tensor:
    """The linear kernel of (n, ...) features with a zero diagonal, float64 (n, n)."""
    flat = features.flatten(1).double()
    return (flat @ flat.T).fill_diagonal_(0.0)


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - the letters of the paper
    """HSIC_1 of two kernels (n, n) with zero diagonals, n >= 4."""
    n = len(k)
    rows_k, rows_l = k.sum(0), l.sum(0)
    both = (k * l).sum() + rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_k @ rows_l)
    return both / (n * (n - 3))


def cka(batches: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
    """(A, B): the CKA of each of A representations with each of B others. A batch is the features of A, and those of B,
    of the same images."""
    across, own_a, own_b = [], [], []
    for of_a, of_b in batches:
        first, second = [gram(x) for x in of_a], [gram(x) for x in of_b]
        across.append(torch.stack([torch.stack([hsic(k, l) for l in second]) for k in first]))  # noqa: E741
        own_a.append(torch.stack([hsic(k, k) for k in first]))
        own_b.append(torch.stack([hsic(k, k) for k in second]))
    norms = torch.stack(own_a).mean(0)[:, None] * torch.stack(own_b).mean(0)[None, :]
    return torch.stack(across).mean(0) / norms.clamp(min=0).sqrt()
