"""Which number format computes fast here, and compilation that falls back instead of failing."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

from spherelm.layers.mamba2 import StateSpace
from spherelm.models import Decoder


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


def leave_state_spaces_uncompiled(model: nn.Module) -> None:
    """Keep what a Mamba mixer does between its matrices out of compilation on a processor.

    What Inductor (torch 2.13, with g++ 12 and AVX512) writes for it computes garbage in 16 bits, where a kernel reads two tiles
    across their layout, and has been seen to write beyond its buffers. The mixer's matrices, norms and steps are compiled.
    """
    for module in model.modules():
        if isinstance(module, StateSpace) and module.A_log.device.type == "cpu":
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]


def compile_blocks(model: Decoder, trial: Callable[[], object]) -> None:
    """Compile each block of `model` in place, and its read-out: blocks share one compilation, a fraction of the whole's time.

    trial: uses the blocks once, which is when they are compiled. Where that fails, this says so on stderr and the process
    goes on without compilation.
    """
    try:
        leave_state_spaces_uncompiled(model)
        for block in model.blocks:
            block.compile()
        model.head.compile()
        model.runtime.score = torch.compile(model.runtime.score)
        trial()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"spherelm: torch.compile does not work here ({reason}); going on without it", file=sys.stderr)
        torch.compiler.set_stance("force_eager")
