"""Which number format computes fast here, and compilation that falls back instead of failing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import nn

from spherelm.errors import unknown
from spherelm.layers.mamba2 import StateSpace
from spherelm.models import Decoder
from spherelm.progress import say
from spherelm.train.rehearsal import known_dtype, matrices


def resolve_dtype(name: str, model: nn.Module, rows: int) -> torch.dtype:
    """The dtype of the computation that "auto", "float32" or "bfloat16" means for `model` on `rows` tokens at once.

    "auto" is, on a processor, in which the products of the model are faster; on a GPU bfloat16 where it has
    that in hardware.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    device = next(model.parameters()).device
    if device.type == "cpu":
        return known_dtype(matrices(model), rows)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def name_of(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    """As a configuration names what `resolve_dtype` gives."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


_CHOSEN: ContextVar[torch.device | None] = ContextVar("device", default=None)


def best_device() -> torch.device:
    """The device that was chosen by `on_device`; else the accelerator if there is one, else the CPU."""
    return _CHOSEN.get() or torch.accelerator.current_accelerator() or torch.device("cpu")


def devices_here() -> list[str]:
    """The names of this machine's devices."""
    there, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    return ["cpu", *([there.type, *(f"{there.type}:{i}" for i in range(count))] if there else [])]


def check_device(name: str | None, anywhere: bool = False) -> None:
    """Raise `UserError` where this machine has no device of this name, or, if `anywhere`, where no machine has."""
    known = devices_here()
    if name in (None, *known) or (anywhere and re.fullmatch(ACCELERATORS, str(name))):
        return
    raise unknown("device", name, known)


ACCELERATORS = r"(cuda|mps|xpu)(:\d+)?"
"""Names of devices that other machines may have."""


@contextmanager
def on_device(name: str | None) -> Iterator[None]:
    """Have `best_device` be the one of this name, such as "cpu" or "cuda:1", for as long as the context lasts.

    `None` changes nothing. Raises `UserError` where there is no such device.
    """
    check_device(name)
    if name is None:
        yield
        return
    before = _CHOSEN.set(torch.device(name))
    try:
        yield
    finally:
        _CHOSEN.reset(before)


def device_name(device: torch.device) -> str:
    """The device's name: a GPU's model, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def leave_state_spaces_uncompiled(model: nn.Module) -> None:
    """Keep what a Mamba mixer does between its matrices out of compilation on a processor.

    What Inductor (torch 2.13, with g++ 12 and AVX512) writes for it computes garbage in 16 bits, where a kernel reads
    two tiles across their layout, and has been seen to write beyond its buffers. The mixer's matrices, norms and
    steps are compiled.
    """
    for module in model.modules():
        if isinstance(module, StateSpace) and module.A_log.device.type == "cpu":
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]


def compile_parts(model: Decoder) -> None:
    """Have each block of `model`, and its read-out, compiled when it is next used: blocks share one compilation."""
    leave_state_spaces_uncompiled(model)
    for block in model.blocks:
        block.compile()
    model.head.compile()
    model.runtime.score = torch.compile(model.runtime.score)


def compile_blocks(model: Decoder, trial: Callable[[], object]) -> None:
    """`compile_parts`, which takes a fraction of the time of compiling the model whole.

    trial: uses the blocks once, which is when they are compiled. Where that fails, this says so on stderr and the
    process continues without compilation.
    """
    try:
        compile_parts(model)
        trial()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(f"torch.compile does not work here ({reason}); continuing without it")
        torch.compiler.set_stance("force_eager")
