"""Auxiliary heads that are made for sequences (B, T, D), such as those of a decoder: the forms that InfoPro's and
PredSim's heads for maps take where there is no map.

    InfoPro     reconstruction of pixels by binary cross-entropy     of ids by cross-entropy, behind one linear layer
    PredSim     3x3 convolution, deviation over positions            linear layer, deviation over tokens
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.models import grouped, losses
from pipeline.models.heads import IMAGE, AuxiliaryHead, Given, Patches


class IdsHead(AuxiliaryHead):
    """Features (B, T, D) -> the ids int64 (B, T) that the network was given, each from the feature at its place.

    InfoPro's loss bounds the information that a feature has about the input by the likelihood of a reconstruction (its
    eq. 6); of pixels that is a binary cross-entropy, of ids a cross-entropy over all that there are.
    """

    asks = frozenset({IMAGE})

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(width, vocabulary)

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        assert given.image is not None
        return losses.cross_entropy(self.decoder(feature).flatten(0, 1), given.image.flatten())


class SequenceSimilarityHead(AuxiliaryHead):
    """PredSim's similarity matching behind its own linear layer, of sequences (B, T, D) or vectors (B, D). As of the
    positions of a map, the standard deviation over the tokens is compared."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.classes = classes

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        return losses.similarity_matching(_as_map(self.linear(feature)), given.target, self.classes)

    def takes_patches(self, dims: int) -> bool:
        return type(self) is SequenceSimilarityHead and dims == 3

    def losses_of_patches(self, patches: Patches, heads: Sequence[AuxiliaryHead]) -> Tensor:
        networks = [[head.linear] for head in heads if isinstance(head, SequenceSimilarityHead)]
        x = _as_map(grouped.run(networks, patches.feature, patches.groups))
        return losses.similarity_matching(x, patches.targets[0], self.classes, patches.groups)


def _as_map(x: Tensor) -> Tensor:
    """(B, T, D) -> (B, D, T, 1); a vector stays."""
    return x.mT[..., None] if x.dim() == 3 else x
