"""The local losses, as functions of tensors. Every loss is the mean over the batch and is computed in full precision.

Those with ``groups`` = G are of G patches at once, groups of channels side by side: they give one loss for each, (G,).
`full` precision means float32 or wider: autocast is switched off inside, bf16 inputs are widened.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_WIDEN = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
_ENTROPY_FLOOR = 9.999999960041972e-13  # PyTorch's floor of p (1 - p): 1e-12 rounded to float32
_LENGTH_FLOOR = 1e-8  # added to a length that is divided by


def full(x: Tensor) -> Tensor:
    """``x`` in float32 or wider."""
    return x.to(_WIDEN.get(x.dtype, x.dtype))


def image_target(image: Tensor, like: Tensor) -> Tensor:
    """The un-normalised image in [0, 1]: uint8 (B, C, S, S) is divided by 255, floating point is taken as it is.

    The result has the dtype (widened) and the memory layout of ``like`` (B, C, S, S).
    """
    target = torch.empty_like(like, dtype=_WIDEN.get(like.dtype, like.dtype)).copy_(image)
    return target.div_(255.0) if image.dtype == torch.uint8 else target


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy. logits (B, classes), labels int64 (B,) or shares of the classes (B, classes).

    ``smoothing``: share of the target that is spread evenly over all classes (Szegedy et al. 2016, sec. 7).
    """
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(full(logits), labels, label_smoothing=smoothing)


def grouped_cross_entropy(logits: Tensor, labels: Tensor, groups: int) -> Tensor:
    """Softmax cross-entropy of G patches that have the same labels: logits (B, G classes), labels (B,) -> (G,)."""
    with torch.autocast(logits.device.type, enabled=False):
        rows = full(logits).reshape(len(labels) * groups, -1)
        return F.cross_entropy(rows, labels.repeat_interleave(groups), reduction="none").view(-1, groups).mean(dim=0)


class _SigmoidEntropy(torch.autograd.Function):
    """Mean binary cross-entropy of sigmoid(logits) against a target of the same shape, as two published operations.
    Of more than one group of channels, the mean of each.

    The gradient is (p - t) p (1 - p) / max(p (1 - p), 1e-12), where PyTorch's entropy has the floor: p - t, and 0
    where the sigmoid has saturated. It is computed with the loss, while p is at hand, so only one tensor is kept.

    log(1 - p) takes an eighth of the time of log1p(-p) on a CPU and is off by 1e-7 at most; one group, which is what
    patches one after another are, keeps log1p and with it the bits of earlier runs.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, groups: int) -> Tensor:
        p = torch.sigmoid(logits)
        present = p.log().clamp_(min=-100.0)
        rest = 1.0 - p
        absent = (p.neg().log1p_() if groups == 1 else rest.log()).clamp_(min=-100.0)
        entropy = torch.addcmul(absent, target, present.sub_(absent))
        ctx.groups = groups
        if ctx.needs_input_grad[0]:
            unsaturated = rest.mul_(p).div_(_ENTROPY_FLOOR).clamp_(max=1.0)
            ctx.save_for_backward(p.sub_(target).mul_(unsaturated))
        if groups == 1:
            return entropy.mean().neg_()
        return entropy.mean(dim=(0, 2, 3)).view(groups, -1).mean(dim=1).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        share = gradient / (slope.numel() // ctx.groups)
        if ctx.groups > 1:  # of every channel
            share = share.repeat_interleave(slope.size(1) // ctx.groups)[:, None, None]
        return slope * share, None, None


def reconstruction(logits: Tensor, image: Tensor, groups: int = 1) -> Tensor:
    """Binary cross-entropy of sigmoid(logits) against the image, mean over all B*C*S*S entries (InfoPro, eq. 6).

    logits (B, C, S, S); image (B, C, S, S) uint8 or floating point in [0, 1]. Sigmoid and entropy stay separate, as
    published: where the sigmoid saturates the gradient is 0 and the logarithm is cut at -100, and the golden vectors
    see the difference to the numerically stable form.

    Of G > 1 groups: logits and image (B, G C, S, S) -> (G,).
    """
    with torch.autocast(logits.device.type, enabled=False):
        loss: Tensor = _SigmoidEntropy.apply(full(logits), image_target(image, logits), groups)
    return loss


def supervised_contrast(embedding: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss with one view (Khosla et al. 2020, L_out; InfoPro `contrast`).

    embedding (B, D), normalised here to unit length; labels int64 (B,). An anchor without a positive in the batch
    contributes 0 and stays in the batch mean. Of G patches at once: (G, B, D) -> (G,).
    """
    with torch.autocast(embedding.device.type, enabled=False):
        z = F.normalize(full(embedding), dim=-1)
        similarity = z @ z.mT / temperature
        itself = torch.eye(z.size(-2), dtype=torch.bool, device=z.device)
        log_probability = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(dim=-1, keepdim=True)
        positive = (labels[:, None] == labels[None, :]) & ~itself
        count = positive.sum(dim=1).clamp(min=1)
        return -(log_probability.masked_fill(~positive, 0.0).sum(dim=-1) / count).mean(dim=-1)


def similarity_matrix(x: Tensor, groups: int = 1) -> Tensor:
    """Adjusted cosine similarity between samples, (B, ...) -> (B, B) in [-1, 1] (Nokland & Eidnes 2019, eq. 2).

    A feature map with more than 3 channels and more than 1 row is first reduced to its per-channel standard deviation
    over positions (unbiased). Of G > 1 groups of channels, (B, G C, h, w) -> (G, B, B).
    """
    x = full(x)
    reduced = x.dim() == 4 and x.size(1) > 3 * groups and x.size(2) > 1
    x = x.flatten(2).std(dim=2) if reduced else x.flatten(1)
    if groups > 1:
        x = x.view(len(x), groups, -1).transpose(0, 1)
    x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.norm(dim=-1, keepdim=True) + _LENGTH_FLOOR)
    return (x @ x.mT).clamp(-1.0, 1.0)


def similarity_matching(feature: Tensor, labels: Tensor, classes: int, groups: int = 1) -> Tensor:
    """Mean squared difference between the similarities of features and those of one-hot labels (PredSim, eq. 1).

    feature (B, ...), labels int64 (B,); or shares of the classes (B, classes), in place of one-hot labels. Of G > 1
    groups of channels, (B, G C, h, w) -> (G,).
    """
    with torch.autocast(feature.device.type, enabled=False):
        similarity = similarity_matrix(feature, groups)
        if labels.dim() == 2:
            distance = (similarity - similarity_matrix(labels.to(similarity.dtype))).square()
            return distance.mean() if groups == 1 else distance.mean(dim=(1, 2))
        if groups == 1:
            return F.mse_loss(similarity, similarity_matrix(F.one_hot(labels, classes).to(similarity.dtype)))
        return (similarity - _label_similarity(labels, classes, similarity.dtype)).square().mean(dim=(1, 2))


def _label_similarity(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """:func:`similarity_matrix` of one-hot labels, (B, B): it has two values, of equal labels and of others."""
    square = (classes - 1) / classes  # of the length of a one-hot vector without its mean
    divisor = (square**0.5 + _LENGTH_FLOOR) ** 2
    equal, other = square / divisor, -1 / classes / divisor
    return (labels[:, None] == labels).to(dtype).mul_(equal - other).add_(other)
