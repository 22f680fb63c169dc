"""A 3x3 convolution of a bilinearly upsampled feature map, computed at the low resolution.

Upsampling and convolution are linear, so their order is free. Per axis, "interpolate to W, pad with a zero, shift by
the tap d" is one constant matrix A_d of shape W x w, and

    conv3x3(upsample(x))[Y, X] = sum_dy sum_dx  A_dy[Y, :] . (K_dy,dx x) . A_dx[X, :]^T

    x (B, C, h, w) --9 taps, a 1x1 convolution--> (B, h, w, 9 O) --columns--> (B, h, 3 O, W) --rows--> (B, O, H, W)

At 4x upsampling of 64 channels to 12 this takes 1/10 of the multiplications of the plain order and keeps no map of 64
channels at full resolution. Same function up to rounding; parameters and their names are those of ``nn.Conv2d``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.tuned import Tuned

HALF = (torch.bfloat16, torch.float16)


def shifted_interpolation(low: int, high: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Interpolation of ``low`` positions at ``high`` ones (align_corners), shifted by the three taps of a kernel.

    Returns:
        (high, low * 3): entry [X, 3 x + d] is the weight of input x at the upsampled position X + d - 1; a position
        outside has weight 0, which is the zero padding of the convolution.
    """
    step = (low - 1) / (high - 1) if high > 1 else 0.0
    source = torch.arange(high, dtype=torch.float64) * step
    left = source.floor().long().clamp(max=low - 1)
    share = source - left
    weights = torch.zeros(high + 2, low, dtype=torch.float64)  # a row of zeros on both sides
    positions = torch.arange(1, high + 1)
    weights[positions, left] = 1.0 - share
    weights.index_put_((positions, (left + 1).clamp(max=low - 1)), share, accumulate=True)
    taps = torch.stack([weights[d : d + high] for d in range(3)], dim=2)  # (high, low, 3)
    return taps.reshape(high, 3 * low).to(device, dtype)


class _UpsampledConvolution(torch.autograd.Function):
    """``(x, weight, bias, rows, columns) -> (B, O, H, W)``; rows (H, 3 h) and columns (W, 3 w) are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        (batch, channels, h, w), out = x.shape, weight.size(0)
        high, wide = rows.size(0), columns.size(0)
        pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)
        kernel = weight.permute(1, 3, 2, 0).reshape(channels, 9 * out)  # taps in the order dx, dy, output
        taps = pixels @ kernel  # (B h w, 9 O)
        # Every row of an interpolation sums to 1, so the bias may enter at the centre tap, at low resolution.
        taps.view(-1, 3, 3, out)[:, 1, 1] += bias
        taps = taps.to(rows.dtype).view(batch * h, 3 * w, 3 * out)
        lines = torch.bmm(taps.transpose(1, 2), columns.t().expand(batch * h, -1, -1))  # (B h, 3 O, W)
        result = torch.bmm(rows.expand(batch, -1, -1), lines.view(batch, 3 * h, out * wide))
        ctx.save_for_backward(pixels, kernel, rows, columns)
        ctx.x_shape = x.shape
        result = result.view(batch, high, out, wide).permute(0, 2, 1, 3).to(x.dtype)
        return result.contiguous(memory_format=_layout(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        pixels, kernel, rows, columns = ctx.saved_tensors
        batch, channels, h, w = ctx.x_shape
        _, out, high, wide = gradient.shape
        full = gradient.to(rows.dtype).permute(0, 2, 1, 3).reshape(batch, high, out * wide)
        lines = torch.bmm(rows.t().expand(batch, -1, -1), full).view(batch * h, 3 * out, wide)
        taps = torch.bmm(columns.t().expand(batch * h, -1, -1), lines.transpose(1, 2)).view(-1, 9 * out)
        bias = taps.view(-1, 3, 3, out)[:, 1, 1].sum(dim=0)
        taps = taps.to(pixels.dtype)
        weight = (pixels.t() @ taps).view(channels, 3, 3, out).permute(3, 0, 2, 1)
        x = (taps @ kernel.t()).view(batch, h, w, channels).permute(0, 3, 1, 2)
        return x, weight, bias.to(pixels.dtype), None, None


def _layout(x: Tensor) -> torch.memory_format:
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


class UpsampledConv2d(nn.Conv2d):
    """``conv(interpolate(x, size, bilinear, align_corners))`` with a zero-padded 3x3 kernel and a bias, in that
    order."""

    def __init__(self, in_channels: int, out_channels: int, device: torch.device | str | None = None) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, device=device)

    # Not in place of another Conv2d, whose parameters it has: only AuxiliaryHeads call it, with the size.
    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """x (B, C, h, w) -> (B, O, H, W) with ``size`` = (H, W)."""
        if x.shape[2:] != size:  # at full size the interpolation is the identity
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        return super().forward(x)


class FactorisedConv2d(UpsampledConv2d, Tuned):
    """:class:`UpsampledConv2d` in the order that needs fewer multiplications.

    Under autocast the 1x1 convolution runs in the autocast dtype and the interpolation in float32: its weights are no
    powers of two, and bf16 would round each of them.

    Gains 1.24 to 1.33 on InfoPro's heads (``benchmarks/heads.py``, AVX-512).
    """

    tuned = "upsampling"

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self._constants: dict[tuple[object, ...], Tensor] = {}

    def plain(self) -> nn.Module:
        return self._shared_with(UpsampledConv2d(self.in_channels, self.out_channels, device="meta"))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """x (B, C, h, w) -> (B, O, H, W) with ``size`` = (H, W)."""
        low = (x.size(2), x.size(3))
        if not self.factorises(low, size):
            return super().forward(x, size)
        assert self.bias is not None
        device = x.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        exact = torch.float32 if compute in HALF else compute
        rows, columns = (self._constant(n, m, exact, x.device) for n, m in zip(low, size, strict=True))
        with torch.autocast(device, enabled=False):
            y: Tensor = _UpsampledConvolution.apply(
                x.to(compute), self.weight.to(compute), self.bias.to(compute), rows, columns
            )
        return y

    def taps(self) -> tuple[Tensor, Tensor]:
        """Weight (9 O, C) and bias (9 O,) of the 1x1 convolution of the factorised form; taps in the order dx, dy,
        output, the bias at the centre tap."""
        assert self.bias is not None
        out = self.out_channels
        return self.weight.permute(3, 2, 0, 1).reshape(9 * out, -1), F.pad(self.bias, (4 * out, 4 * out))

    def interpolated(self, taps: Tensor, size: tuple[int, int]) -> Tensor:
        """The rest of the factorised form: taps (N, h, w, 9 O) -> (N, H, O, W), in float32 or wider."""
        (count, h, w), out = taps.shape[:3], self.out_channels
        exact = torch.float32 if taps.dtype in HALF else taps.dtype
        rows, columns = (self._constant(n, m, exact, taps.device) for n, m in zip((h, w), size, strict=True))
        with torch.autocast(taps.device.type, enabled=False):
            taps = taps.to(exact).view(count * h, 3 * w, 3 * out).transpose(1, 2)
            lines = torch.bmm(taps, columns.t().expand(count * h, -1, -1)).view(count, 3 * h, out * size[1])
            return torch.bmm(rows.expand(count, -1, -1), lines).view(count, size[0], out, size[1])

    def factorises(self, low: Sequence[int], size: tuple[int, int]) -> bool:
        """Whether the factorised form runs for a map of sides ``low``."""
        return tuple(low) != size and self.is_cheaper_factorised((low[0], low[1]), size)

    def is_cheaper_factorised(self, low: tuple[int, int], size: tuple[int, int]) -> bool:
        """Whether the factorised form needs fewer multiplications for one forward and backward.

        A product with parameters is done three times in a step (output, two gradients), one with constants twice.
        """
        (h, w), (high, wide), out = low, size, self.out_channels
        per_pixel = 9 * self.in_channels * out
        constant = h * wide * 3 * w * 3 * out + high * wide * 3 * h * out
        return 3 * h * w * per_pixel + 2 * constant < 3 * high * wide * per_pixel

    def _constant(self, low: int, high: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The matrix of one axis, built once for each size."""
        key = (low, high, dtype, device)
        if key not in self._constants:
            self._constants[key] = shifted_interpolation(low, high, dtype, device)
        return self._constants[key]
