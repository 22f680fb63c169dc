"""The local losses, as functions of tensors. Every loss is the mean over the batch and is computed in full precision.

`full` precision means float32 or wider: autocast is switched off inside, bf16 inputs are widened.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDEN = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def _full(x: Tensor) -> Tensor:
    return x.to(_WIDEN.get(x.dtype, x.dtype))


def image_target(image: Tensor, like: Tensor) -> Tensor:
    """The un-normalised image in [0, 1]: uint8 (B, C, S, S) is divided by 255, floating point is taken as it is."""
    if image.dtype == torch.uint8:
        return image.to(_full(like).dtype) / 255.0
    return image.to(_full(like).dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy. logits (B, classes), labels int64 (B,)."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(_full(logits), labels)


def reconstruction(logits: Tensor, image: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(logits) against the image, mean over all B*C*S*S entries (InfoPro, eq. 6).

    logits (B, C, S, S); image (B, C, S, S) uint8 or floating point in [0, 1]. Sigmoid and entropy stay separate, as
    published: where the sigmoid saturates the gradient is 0 and the logarithm is cut at -100, and the golden vectors
    see the difference to the fused form.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy(torch.sigmoid(_full(logits)), image_target(image, logits))


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
