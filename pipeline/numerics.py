"""Arithmetic: compute dtype, memory layout, and seeds that do not depend on the placement."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import PrecisionConfig

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
        """``x`` detached, in the boundary dtype and layout: the same bits whether or not it crosses a process."""
        x = x.detach().to(self.dtype)
        if x.dim() == 4:
            return x.contiguous(memory_format=self.layout)
        return x.contiguous()

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of 4-D tensors."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, module: nn.Module) -> None:
        """Move a module to the device and layout; parameters stay float32 under bf16 autocast."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        module.to(device=self.device, dtype=dtype, memory_format=self.layout)


def resolve_numerics(config: PrecisionConfig, device: torch.device) -> Numerics:
    """Choose what ``auto`` leaves open.

    bf16 where the device has units for it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX): emulated bf16 was
    measured to be 16 times slower than fp32. Channels last always: measured 1.2 to 1.3 times faster in fp32 on a CPU
    (benchmarks/results/precision-cpu.md).
    """
    compute = config.compute
    if compute == "auto":
        compute = "bf16" if has_bf16_units(device) else "fp32"
    return Numerics(device, DTYPES[compute], config.channels_last != "off")


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
