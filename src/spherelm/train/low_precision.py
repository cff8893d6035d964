"""A run whose products have operands of few bits: which products, what rounding draws, and what is said of it."""

from __future__ import annotations

import hashlib

import torch

from spherelm.errors import UserError
from spherelm.layers.linear import ExpertLinear, Linear, block_matrices
from spherelm.layers.low_precision import BLOCKS, LowPrecisionProduct, Precision, by_groups, torchao
from spherelm.models import Decoder, NGPTConfig


def lower_precision(model: Decoder, precision: Precision, seed: int = 0) -> torch.Generator:
    """Have every product with a matrix of the blocks of `model` rounded as `precision` says;
    returns what rounding draws from.

    seed: of that, and of the signs of a Hadamard transform. Embeddings, read-out, routers, norms and the core of
    attention stay as they are. Raises `UserError` where torchao is missing, or for a matrix whose sides are not whole
    blocks of the format.
    """
    if precision.kind is None:
        return torch.Generator()
    noise = torch.Generator(next(model.parameters()).device)
    seed_noise(noise, seed)
    joined = isinstance(model.config, NGPTConfig) and model.config.variant.inner_norm
    for module in matrices_for(model, precision.kind):
        on_sphere = hasattr(module, "unit_axis")
        product = LowPrecisionProduct(precision, on_sphere and (joined or not module.writes), on_sphere, noise)
        module.product = product if isinstance(module, Linear) else by_groups(product)
    return noise


def matrices_for(model: Decoder, kind: str) -> list[Linear | ExpertLinear]:
    """The matrices of the blocks of `model`; raises `UserError` where the format `kind` cannot round one of them."""
    if kind != "nvfp4":
        torchao(f"precision={kind}")
    block, found = BLOCKS[kind], []
    for name, module in block_matrices(model):
        rows, columns = module.weight.shape[-2:]
        if rows % block or columns % block:
            raise UserError(
                f"precision={kind} takes {block} numbers at a time, and {name} is {rows} x {columns}: choose sizes that "
                f"are multiples of {block}"
            )
        found.append(module)
    return found


def check_precision(model: Decoder, precision: Precision) -> None:
    """Raise what `lower_precision` would raise; the model may be on the meta device."""
    if precision.kind is not None:
        matrices_for(model, precision.kind)


def seed_noise(noise: torch.Generator, *numbers: int) -> None:
    """Have `noise` draw what belongs to these numbers, whatever it drew before,
    so that a resumed run draws the same.
    """
    noise.manual_seed(int(hashlib.sha256(repr(numbers).encode()).hexdigest()[:15], 16))


def emulation(precision: Precision, dtype: str) -> list[str]:
    """The line that says what the products of a run are rounded to, and that this is emulated;
    none without a format.
    """
    if precision.kind is None:
        return []
    operands = [name for name in ("inputs", "weights", "gradients") if getattr(precision, name)]
    own = ""
    if precision.kind == "nvfp4":
        own = f"; amax {precision.amax}{', Hadamard transform' * precision.hadamard}"
        own += ", stochastic rounding" * (precision.stochastic and precision.gradients)
    return [
        f"{precision.kind} of {', '.join(operands) or 'nothing'}{own}: emulated, rounded and multiplied in {dtype}, which is "
        "slower than without; no torch.compile"
    ]
