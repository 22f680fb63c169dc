"""Arithmetic: compute dtype, memory layout, and seeds that do not depend on the placement."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.base.config import PrecisionConfig
from pipeline.base.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Numerics:
    """How one rank computes.

    Attributes:
        device: of all its modules.
        dtype: of activations and gradients at module boundaries, and so on the wire.
        channels_last: 4-D tensors are kept in NHWC order.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """bf16 autocast, or nothing."""
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def boundary(self, x: Tensor) -> Tensor:
        """``x`` detached, in the boundary dtype and layout: the same bits whether or not it crosses a process. Integers
        and masks keep their dtype."""
        x = x.detach()
        if x.is_floating_point():
            x = x.to(self.dtype)
        if x.dim() == 4:
            return x.contiguous(memory_format=self.layout)
        return x.contiguous()

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of 4-D tensors."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, module: nn.Module) -> None:
        """Move a module to the device and layout."""
        module.to(device=self.device, dtype=self.weight_dtype).to(memory_format=self.layout)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of parameters: they stay float32 under bf16 autocast."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def resolve_numerics(config: PrecisionConfig, device: torch.device, network: Iterable[nn.Module]) -> Numerics:
    """Choose what ``auto`` leaves open.

    bf16 where the device has units for it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX): emulated bf16 was
    measured to be about 10 times slower than fp32. Channels last always: 1.15 to 1.2 times faster in fp32 on a CPU
    (benchmarks/results/precision-cpu.md); except where oneDNN's NHWC kernels write out of bounds.

    Raises:
        ConfigError: ``channels_last = "on"`` for a network for which that would corrupt memory.
    """
    compute = config.compute
    if compute == "auto":
        compute = "bf16" if has_bf16_units(device) else "fp32"
    channels_last = config.channels_last != "off"
    if channels_last and device.type == "cpu" and (narrow := narrow_strided_convolution(network)) is not None:
        if config.channels_last == "on":
            raise ConfigError(
                f"precision.channels_last = 'on': the strided 1x1 convolution with {narrow} input channels would "
                "corrupt memory on this CPU (oneDNN issue 6035); use 'auto' or 'off'"
            )
        channels_last = False
    return Numerics(device, DTYPES[compute], channels_last)


def narrow_strided_convolution(network: Iterable[nn.Module]) -> int | None:
    """Input channels of a strided 1x1 convolution with fewer than 16 of them, or None.

    The weight gradient of such a convolution writes past its workspace in NHWC (oneDNN issue 6035: fewer than 8
    channels with AVX2, 16 with AVX512; seen with torch 2.15 as heap corruption).
    """
    for block in network:
        for layer in block.modules():
            if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or max(layer.stride) == 1:
                continue
            if layer.in_channels < 16:
                return layer.in_channels
    return None


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 arithmetic runs in hardware on ``device``."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def stable_hash(*parts: object) -> int:
    """A 63-bit integer from the parts' text, the same in every process and Python version."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_rng(seed: int, device: torch.device) -> None:
    """Seed the default RNG of the CPU and of ``device``."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
