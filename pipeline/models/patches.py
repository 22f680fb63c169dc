"""Patch feature fusion: a head on each patch of a feature (HPFF, eq. 6-7), one after another or many at once.

    map (B, C, H, W)         sequence (B, T, D)        vector (B, D)
    +----+----+
    | 0  | 1  |              | 0 | 1 |                 one patch
    +----+----+              contiguous parts of T
    | 2  | 3  |
    +----+----+

What a head is given is cut like the feature where it has the same sides: of a map the last two dimensions of an image,
of inputs and of a target with three dimensions or more; of a sequence the dimension after the batch. Tokens of an image
are read as a map, or in the order of its patches (:mod:`pipeline.models.tokens`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.heads import AuxiliaryHead, FeatureShape, Given, Patches
from pipeline.models.spread import Gradient, Spread, whole
from pipeline.models.tokens import AsMap, Reading

Autocast = Callable[[], contextlib.AbstractContextManager[None]]
Patch = tuple[slice, ...]
"""Index of a patch in a tensor."""
WHOLE: Patch = (slice(None),)


def patch_slices(size: int, grid: int) -> list[slice]:
    """Cut ``size`` positions into ``grid`` consecutive ranges that differ by at most one."""
    edges = [index * size // grid for index in range(grid + 1)]
    return [slice(low, high) for low, high in zip(edges, edges[1:], strict=False)]


def patch_shape(shape: FeatureShape, grid: int) -> FeatureShape:
    """Shape of the largest patch; heads size their first pooling by it."""
    match shape:
        case (channels, height, width):
            return (channels, -(-height // grid), -(-width // grid))
        case (length, depth):
            return (-(-length // grid), depth)
    return shape


def patches_of(x: Tensor, feature: Tensor, grid: int) -> list[Patch]:
    """Where the patches of ``feature`` are in ``x``, which is that feature or goes with it; of what has no such sides,
    everything."""
    if grid > 1 and feature.dim() == 4 and x.dim() >= 3:
        rows, columns = patch_slices(x.size(-2), grid), patch_slices(x.size(-1), grid)
        return [(..., row, column) for row in rows for column in columns]  # type: ignore[misc]
    if grid > 1 and feature.dim() == 3 and x.dim() >= 2 and x.size(1) == feature.size(1):
        return [(slice(None), part) for part in patch_slices(x.size(1), grid)]
    return [WHOLE] * {4: grid * grid, 3: grid}.get(feature.dim(), 1)


def _parts(x: Tensor, feature: Tensor, grid: int) -> list[Tensor]:
    """What goes with each patch of ``feature``: views of ``x``, or ``x`` itself."""
    return [x if patch == WHOLE else x[patch] for patch in patches_of(x, feature, grid)]


class PatchedHead(nn.Module):
    """A head on ``grid`` x ``grid`` patches of a map, or ``grid`` patches of a sequence.

    One after another: loss, backward, graph freed; so only one patch's graph is alive. Many at once: a few large
    operations in place of many small ones, and as many graphs. BatchNorm inside the head sees one patch at a time in
    both; patches at once must be of one size and the head must say that it takes them
    (:meth:`AuxiliaryHead.takes_patches`), else they come one after another.

        shared      one head for all patches, average of losses  (paper)
        separate    a head per patch of a map, sum of losses     (released code, decoder only)

    Args:
        make: builds one head for a patch.
        grid: patches along each side; 1 is the plain head.
        separate: one head per patch and the sum of losses instead of a shared head and their average.
        at_once: most patches that are worked on together; the bits of the result depend on it.
        reading: of features that are tokens of an image; patches are those of what it gives.
    """

    def __init__(
        self,
        make: Callable[[], AuxiliaryHead],
        grid: int,
        separate: bool = False,
        at_once: int = 1,
        reading: Reading | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.separate = separate
        self.at_once = at_once
        self.reading = reading
        self.heads = nn.ModuleList(make() for _ in range(grid * grid if separate else 1))
        self._takes: dict[int, bool] = {}  # by dimensions; asked in every step, and all of the head's layers answer

    @property
    def asks(self) -> frozenset[str]:
        """What its head asks for."""
        return self.of(0).asks

    @property
    def first(self) -> AuxiliaryHead:
        """Its head, that of the first patch where there is one per patch."""
        return self.of(0)

    def of(self, patch: int) -> AuxiliaryHead:
        """The head of a patch."""
        head = self.heads[patch if self.separate else 0]
        assert isinstance(head, AuxiliaryHead)
        return head

    def backward(
        self,
        feature: Tensor,
        given: Given,
        weight: float,
        gradient: Tensor | None = None,
        autocast: Autocast = contextlib.nullcontext,
    ) -> tuple[Tensor, Tensor]:
        """Run the head and its backward pass on a feature (B, C, H, W), (B, T, D) or (B, D) that does not require grad.

        ``autocast`` makes the context of the forward pass; a backward pass chooses its dtypes from the forward's and
        runs outside. The heads' own gradients are added to their ``.grad``.

        Returns:
            ``weight * d loss / d feature``, added to ``gradient`` in place where one is given, and the un-weighted
            loss (float64 scalar, detached).
        """
        ((found, loss),) = backward_together([self], feature, given, [weight], [gradient], autocast)
        return whole(found), loss

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        """The loss of all patches, one after another, in one graph with ``feature``."""
        feature, given = self._read(feature, given)
        patches = patches_of(feature, feature, self.grid)
        cut = zip(patches, self._cut(given, feature), strict=True)
        losses = torch.stack([self.of(index).loss(feature[patch], its) for index, (patch, its) in enumerate(cut)])
        return losses.sum() if self.separate else losses.mean()

    def like(self, other: PatchedHead) -> bool:
        """Whether both are heads of one structure, so that :func:`backward_together` runs them at once."""
        shared = not self.separate and not other.separate
        alike = (self.grid, self.reading) == (other.grid, other.reading)
        return shared and alike and repr(self.heads) == repr(other.heads)

    def patches(self, dims: int) -> int:
        """Of a feature of ``dims`` dimensions with the batch."""
        return {4: self.grid**2, 3: self.grid}.get(self._dims(dims), 1)

    def takes_patches(self, dims: int) -> bool:
        """Whether its head takes many patches at once of such features."""
        return self._head_takes_patches(self._dims(dims))

    def largest_block(self, dims: int) -> int:
        """Most patches of such a feature that one call works on: whole rows of the grid, or a part of one."""
        patches = self.patches(dims)
        if patches == 1 or not self.takes_patches(dims):
            return 1
        return max(len(a) * len(b) for a, b in rectangles(patches // self.grid, self.grid, self.at_once))

    def _head_takes_patches(self, dims: int) -> bool:
        if dims not in self._takes:
            self._takes[dims] = self.first.takes_patches(dims)
        return self._takes[dims]

    def window(self, feature: Tensor) -> tuple[int, int]:
        """Windows by which the whole map may be pooled before it is cut; (1, 1) where patches do not allow it."""
        if feature.dim() != 4 or feature.size(2) % self.grid or feature.size(3) % self.grid:
            return 1, 1
        return self.of(0).window(feature.size(2) // self.grid, feature.size(3) // self.grid)

    def by_patches(
        self,
        feature: Tensor,
        given: Given,
        weight: float,
        gradient: Tensor | None,
        autocast: Autocast,
        pooled: bool,
    ) -> tuple[Tensor, Tensor]:
        """The work of :meth:`backward`, one patch after another; ``pooled``: the feature holds the means of the head's
        windows."""
        patches = patches_of(feature, feature, self.grid)
        share = 1.0 if self.separate else 1.0 / len(patches)
        total = feature.new_zeros((), dtype=torch.float64)
        whole = len(patches) == 1
        result = gradient if gradient is not None or whole else torch.empty_like(feature)
        for index, (patch, its) in enumerate(zip(patches, self._cut(given, feature), strict=True)):
            leaf = feature.detach() if whole else _dense(feature[patch])
            leaf.requires_grad_()
            head = self.of(index)
            with torch.enable_grad(), autocast():
                loss = head.loss_of_means(leaf, its) if pooled else head.loss(leaf, its)
            (loss * (weight * share)).backward()
            total += loss.detach() * share
            assert leaf.grad is not None
            if result is None:
                result = leaf.grad
            elif gradient is not None:
                (result if whole else result[patch]).add_(leaf.grad)
            else:  # the patches cover the feature once, so nothing needs to be zeroed first
                result[patch].copy_(leaf.grad)
            del leaf, loss  # before the next patch takes its memory
        assert result is not None
        return result, total

    def together(self, feature: Tensor, given: Given) -> bool:
        """Whether there are patches to be worked on together, all of one size, and the head can do that."""
        return min(self.at_once, self.grid) > 1 and self._groups(feature, given)

    def groups(self, feature: Tensor, given: Given) -> bool:
        """Whether patches of this feature, a whole one too, may be groups of channels for this head."""
        return self._groups(*self._read(feature[:1], given))

    def _groups(self, feature: Tensor, given: Given) -> bool:
        if feature.dim() not in (3, 4):
            return False
        image = feature if given.image is None else given.image
        sides = [*feature.shape[2:], *image.shape[2:]] if feature.dim() == 4 else [feature.size(1)]
        return all(side % self.grid == 0 for side in sides) and self._head_takes_patches(feature.dim())

    def _read(self, feature: Tensor, given: Given) -> tuple[Tensor, Given]:
        """What the head stands on, and what goes with it."""
        return (feature, given) if self.reading is None else (self.reading.feature(feature), self.reading.given(given))

    def _dims(self, dims: int) -> int:
        """Dimensions of what the head stands on."""
        return 4 if isinstance(self.reading, AsMap) else dims

    def _cut(self, given: Given, feature: Tensor) -> list[Given]:
        """What the head is given with every patch: what it asks for, cut like the feature."""
        if len(patches_of(feature, feature, self.grid)) == 1:
            return [given]

        targets = _parts(given.target, feature, self.grid)
        images = [None] * len(targets) if given.image is None else _parts(given.image, feature, self.grid)
        inputs = {name: _parts(x, feature, self.grid) for name, x in (given.inputs or {}).items()}
        return [
            Given(
                target,
                image,
                None if given.inputs is None else {name: cut[index] for name, cut in inputs.items()},
                given.step,
            )
            for index, (target, image) in enumerate(zip(targets, images, strict=True))
        ]

    def logits(self, feature: Tensor) -> Tensor | None:
        """Of a head that gives one output per row, the mean over patches; of one that gives a map or a sequence, the
        patches' outputs put together again. None where it has none."""
        feature = feature if self.reading is None else self.reading.feature(feature)
        patches = patches_of(feature, feature, self.grid)
        scores = []
        for index, patch in enumerate(patches):
            score = self.of(index).logits(feature[patch])
            if score is None:
                return None
            scores.append(score)
        if len(scores) > 1 and scores[0].dim() == feature.dim():
            if feature.dim() == 3:
                output = torch.cat(scores, dim=1)
                return output if self.reading is None else self.reading.output(output)
            rows = [torch.cat(scores[start : start + self.grid], dim=3) for start in range(0, len(scores), self.grid)]
            return torch.cat(rows, dim=2)
        mean = torch.stack(scores).mean(dim=0)
        return mean if self.reading is None else self.reading.rows(mean)


def backward_together(
    heads: Sequence[PatchedHead],
    feature: Tensor,
    given: Given,
    weights: Sequence[float],
    gradients: Sequence[Tensor | None],
    autocast: Autocast = contextlib.nullcontext,
) -> list[tuple[Gradient, Tensor]]:
    """:meth:`PatchedHead.backward` of W heads of one structure on the same feature, one weight and gradient for each;
    more than one may be asked only if it :meth:`PatchedHead.groups`. A gradient that is the same all over a window is
    not spread over it."""
    reading = heads[0].reading
    if reading is None:
        return _together(heads, feature, given, weights, gradients, autocast)
    tokens = feature.detach().requires_grad_()
    with torch.enable_grad():
        read = reading.feature(tokens)
    results: list[tuple[Gradient, Tensor]] = []
    nothing: list[Tensor | None] = [None] * len(heads)
    for (found, loss), gradient in zip(
        _together(heads, read.detach(), reading.given(given), weights, nothing, autocast), gradients, strict=True
    ):
        (back,) = torch.autograd.grad(read, tokens, whole(found), retain_graph=True)
        results.append((back if gradient is None else gradient.add_(back), loss))
    return results


def _together(
    heads: Sequence[PatchedHead],
    feature: Tensor,
    given: Given,
    weights: Sequence[float],
    gradients: Sequence[Tensor | None],
    autocast: Autocast,
) -> list[tuple[Gradient, Tensor]]:
    """:func:`backward_together` on what the heads stand on."""
    window = heads[0].window(feature)
    if window == (1, 1):
        return [*_run(heads, feature, given, weights, gradients, autocast, pooled=False)]
    means = F.avg_pool2d(feature, window)
    nothing: list[Tensor | None] = [None] * len(heads)
    results: list[tuple[Gradient, Tensor]] = []
    for (found, loss), gradient in zip(
        _run(heads, means, given, weights, nothing, autocast, pooled=True), gradients, strict=True
    ):
        spread = Spread.of(found, window, feature)
        results.append((spread if gradient is None else gradient.add_(spread.whole()), loss))
    return results


def _run(
    heads: Sequence[PatchedHead],
    feature: Tensor,
    given: Given,
    weights: Sequence[float],
    gradients: Sequence[Tensor | None],
    autocast: Autocast,
    pooled: bool,
) -> list[tuple[Tensor, Tensor]]:
    """:func:`backward_together`; ``pooled``: the feature holds the means of the heads' windows."""
    first, grid, count = heads[0], heads[0].grid, len(heads)
    if count == 1 and not first.together(feature, given):
        return [first.by_patches(feature, given, weights[0], gradients[0], autocast, pooled)]
    results = [torch.empty_like(feature) if gradient is None else gradient for gradient in gradients]
    cut, into = _split(feature.detach(), grid), [_split(result, grid) for result in results]
    image = None if given.image is None or feature.dim() == 3 else _split(given.image, grid)
    targets = _parts(given.target, feature, grid)
    share = 1.0 if first.separate else 1.0 / len(targets)
    totals = feature.new_zeros(count, dtype=torch.float64)
    nhwc = feature.dim() == 4 and feature.stride(1) == 1
    for rows, columns in rectangles(cut.size(1), cut.size(2), first.at_once):
        some = [row * grid + column for row in rows for column in columns]
        leaf = _packed(_block(cut, rows, columns), count, nhwc).requires_grad_()
        its_image = None if image is None else _packed(_block(image, rows, columns), count, nhwc=False)
        its_targets = [targets[patch] for patch in some for _ in heads]
        patches = Patches(leaf, len(its_targets), its_targets, its_image, pooled)
        networks = [first.of(patch) for patch in some] if first.separate else [head.of(0) for head in heads]
        with torch.enable_grad(), autocast():
            losses = networks[0].losses_of_patches(patches, networks).view(len(some), count)
        losses.backward(_filled(losses, [weight * share for weight in weights]))
        totals.add_(losses.detach().sum(dim=0, dtype=torch.float64), alpha=share)
        assert leaf.grad is not None
        for head, found in enumerate(_unpacked(leaf.grad, count, _block(cut, rows, columns).shape)):
            if gradients[head] is None:  # the patches cover the feature once, so nothing needs to be zeroed first
                _block(into[head], rows, columns).copy_(found)
            else:
                _block(into[head], rows, columns).add_(found)
        del leaf, losses, patches, its_image, found  # before the next patches take their memory
    return list(zip(results, totals.unbind(), strict=True))


def _filled(like: Tensor, values: Sequence[float]) -> Tensor:
    """(n, W), every column one value; no tensor is copied from the host, which would wait for a GPU."""
    if len(values) == 1:
        return torch.full_like(like, values[0])
    return torch.stack([like.new_full(like.shape[:1], value) for value in values], dim=1)


def rectangles(rows: int, columns: int, most: int) -> Iterator[tuple[range, range]]:
    """Cut a grid of patches into blocks of at most ``most``: as many whole rows as fit, else parts of a row."""
    height, width = max(most // columns, 1), min(most, columns)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield range(row, min(row + height, rows)), range(column, min(column + width, columns))


def _split(x: Tensor, grid: int) -> Tensor:
    """The patches of a map as a view (B, grid, grid, C, h, w), of a sequence (B, 1, grid, t, D)."""
    if x.dim() == 3:
        batch, length, depth = x.shape
        return x.view(batch, 1, grid, length // grid, depth)
    batch, channels, height, width = x.shape
    return x.view(batch, channels, grid, height // grid, grid, width // grid).permute(0, 2, 4, 1, 3, 5)


def _block(patches: Tensor, rows: range, columns: range) -> Tensor:
    """Some of :func:`_split`, a view."""
    if (len(rows), len(columns)) == (patches.size(1), patches.size(2)):
        return patches
    return patches[:, rows.start : rows.stop, columns.start : columns.stop]


def _packed(patches: Tensor, copies: int, nhwc: bool) -> Tensor:
    """Some of :func:`_split`, each ``copies`` times, as groups of channels: dense, (B, G C, h, w), NHWC if asked for,
    or (B, t, G D)."""
    batch = len(patches)
    if patches.dim() == 5:
        x = patches.permute(0, 3, 1, 2, 4)  # (B, t, rows, columns, D)
        return _repeated(x, copies).reshape(batch, x.size(1), -1)
    height, width = patches.shape[4:]
    if not nhwc:
        x = patches if copies == 1 else patches.unsqueeze(3).expand(-1, -1, -1, copies, -1, -1, -1)
        return x.reshape(batch, -1, height, width)
    x = _repeated(patches.permute(0, 4, 5, 1, 2, 3), copies)
    return x.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def _repeated(x: Tensor, copies: int) -> Tensor:
    """(..., C) -> (..., copies, C), a view."""
    return x if copies == 1 else x.unsqueeze(-2).expand(*x.shape[:-1], copies, x.size(-1))


def _unpacked(groups: Tensor, copies: int, shape: Sequence[int]) -> list[Tensor]:
    """Views of what goes with :func:`_packed` 's result, each with the ``shape`` of its patches, one of every copy."""
    batch, rows, columns, *rest = shape
    if len(shape) == 5:
        x = groups.view(batch, rest[0], rows, columns, copies, rest[1]).permute(4, 0, 2, 3, 1, 5)
        return list(x.unbind())
    if copies == 1:
        return [groups.view(shape)]
    return list(groups.view(batch, rows, columns, copies, *rest).unbind(3))


def _dense(patch: Tensor) -> Tensor:
    """A copy of a slice (B, C, h, w) of a map, or of another feature, without gaps, in its layout."""
    nhwc = patch.dim() == 4 and patch.stride(1) == 1
    return patch.clone(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
