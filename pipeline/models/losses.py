"""The local losses, as functions of tensors. Every loss is the mean over the batch and is computed in full precision.

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


def _full(x: Tensor) -> Tensor:
    return x.to(_WIDEN.get(x.dtype, x.dtype))


def image_target(image: Tensor, like: Tensor) -> Tensor:
    """The un-normalised image in [0, 1]: uint8 (B, C, S, S) is divided by 255, floating point is taken as it is.

    The result has the dtype (widened) and the memory layout of ``like`` (B, C, S, S).
    """
    target = torch.empty_like(like, dtype=_WIDEN.get(like.dtype, like.dtype)).copy_(image)
    return target.div_(255.0) if image.dtype == torch.uint8 else target


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy. logits (B, classes), labels int64 (B,)."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(_full(logits), labels)


class _SigmoidEntropy(torch.autograd.Function):
    """Mean binary cross-entropy of sigmoid(logits) against a target of the same shape, as two published operations.

    The gradient is (p - t) p (1 - p) / max(p (1 - p), 1e-12), where PyTorch's entropy has the floor: p - t, and 0
    where the sigmoid has saturated. It is computed with the loss, while p is at hand, so only one tensor is kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        present = p.log().clamp_(min=-100.0)
        absent = p.neg().log1p_().clamp_(min=-100.0)
        entropy = torch.addcmul(absent, target, present.sub_(absent)).mean().neg_()
        if ctx.needs_input_grad[0]:
            unsaturated = (1.0 - p).mul_(p).div_(_ENTROPY_FLOOR).clamp_(max=1.0)
            ctx.save_for_backward(p.sub_(target).mul_(unsaturated))
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * (gradient / slope.numel()), None


def reconstruction(logits: Tensor, image: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(logits) against the image, mean over all B*C*S*S entries (InfoPro, eq. 6).

    logits (B, C, S, S); image (B, C, S, S) uint8 or floating point in [0, 1]. Sigmoid and entropy stay separate, as
    published: where the sigmoid saturates the gradient is 0 and the logarithm is cut at -100, and the golden vectors
    see the difference to the numerically stable form.
    """
    with torch.autocast(logits.device.type, enabled=False):
        loss: Tensor = _SigmoidEntropy.apply(_full(logits), image_target(image, logits))
    return loss


def supervised_contrast(embedding: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss with one view (Khosla et al. 2020, L_out; InfoPro `contrast`).

    embedding (B, D), normalised here to unit length; labels int64 (B,). An anchor without a positive in the batch
    contributes 0 and stays in the batch mean.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        z = F.normalize(_full(embedding), dim=1)
        similarity = z @ z.t() / temperature
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        log_probability = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(dim=1, keepdim=True)
        positive = (labels[:, None] == labels[None, :]) & ~itself
        count = positive.sum(dim=1).clamp(min=1)
        return -(log_probability.masked_fill(~positive, 0.0).sum(dim=1) / count).mean()


def similarity_matrix(x: Tensor) -> Tensor:
    """Adjusted cosine similarity between samples, (B, ...) -> (B, B) in [-1, 1] (Nokland & Eidnes 2019, eq. 2).

    A feature map with more than 3 channels and more than 1 row is first reduced to its per-channel standard deviation
    over positions (unbiased).
    """
    x = _full(x)
    reduced = x.dim() == 4 and x.size(1) > 3 and x.size(2) > 1
    x = x.flatten(2).std(dim=2) if reduced else x.flatten(1)
    x = x - x.mean(dim=1, keepdim=True)
    x = x / (x.norm(dim=1, keepdim=True) + 1e-8)
    return (x @ x.t()).clamp(-1.0, 1.0)


def similarity_matching(feature: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean squared difference between the similarities of features and those of one-hot labels (PredSim, eq. 1).

    feature (B, ...), labels int64 (B,).
    """
    with torch.autocast(feature.device.type, enabled=False):
        similarity = similarity_matrix(feature)
        target = similarity_matrix(F.one_hot(labels, classes).to(similarity.dtype))
        return F.mse_loss(similarity, target)
