"""Which arithmetic computes what: bfloat16 where it pays, TF32 by choice, full float32 for every certificate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
Resolved = Literal["float32", "bfloat16"]


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Whether the device has units for bfloat16 products; without them they are emulated, slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def resolve(precision: Precision, device: torch.device) -> Resolved:
    """The precision that `auto` stands for on this device."""
    if precision == "auto":
        return "bfloat16" if multiplies_bfloat16_fast(device) else "float32"
    return precision


def lower_precision(precision: Resolved) -> torch.dtype | None:
    """The dtype to convert to; None: that of the weights, whatever it is."""
    return torch.bfloat16 if precision == "bfloat16" else None


def exact_float32() -> Any:
    """float32 products in full precision: TF32 rounds them to 10 bits, which no certificate survives."""
    return float32_products("ieee")


@contextmanager
def float32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Set how float32 matrix products and convolutions are computed, and put back what was there.

    PyTorch has two sets of switches and refuses to read the older one after the newer one was used.
    """
    backends: Any = torch.backends  # its stubs lack half of these
    gpu = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    cpu = (backends.mkldnn.matmul, backends.mkldnn.conv)
    precisions = [switch.fp32_precision for switch in gpu + cpu]
    try:
        older = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    except RuntimeError:
        older = None
    if older is not None:
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
        backends.cudnn.allow_tf32 = precision == "tf32"
    for switch in gpu:
        switch.fp32_precision = precision
    for switch in cpu:  # where TF32 would stand for other, coarser formats
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            backends.cudnn.allow_tf32 = older[1]
        for switch, previous in zip(gpu + cpu, precisions, strict=True):
            switch.fp32_precision = previous
