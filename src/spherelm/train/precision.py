"""Which number format computes fast here, and compilation that falls back instead of failing."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn


def fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware. A processor that does not is up to 100 times slower at it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the computation that "auto", "float32" or "bfloat16" means on `device`."""
    if name == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def compile_blocks(model: nn.Module, trial: Callable[[], object]) -> None:
    """Compile each block of `model` in place, and its read-out: blocks share one compilation, a fraction of the whole's time.

    trial: uses the blocks once, which is when they are compiled. Where that fails, this says so on stderr and the process
    goes on without compilation.
    """
    try:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile()
        for name in ("readout", "score"):
            setattr(model, name, torch.compile(getattr(model, name)))
        trial()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"spherelm: torch.compile does not work here ({reason}); going on without it", file=sys.stderr)
        torch.compiler.set_stance("force_eager")
