"""Folded models whose matrices are stored in 8 or 4 bits, in tensors of torchao that transformers reads back."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from spherelm.errors import UserError
from spherelm.layers.low_precision import BLOCKS, torchao

READOUT = "lm_head"
"""The matrix that stays as it is, as embeddings, norms and scales do."""


def round_matrices(model: PreTrainedModel, kind: str) -> None:
    """Round the matrices of the blocks of a folded `model` in place, and have `save_pretrained` write them so.

    kind: "fp8", E4M3 with one float32 scale for each unit vector, or row where no vector is unit; "nvfp4", as
    `layers.low_precision.to_nvfp4`, whose blocks lie along the rows. Products are computed in the dtype that `model`
    has now, from the matrices read back. Raises `UserError` where torchao is missing, or a matrix has sides that are
    no whole blocks.
    """
    library = torchao(f"--dtype {kind}")
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != READOUT}
    for name, matrix in matrices.items():
        if any(side % BLOCKS[kind] for side in matrix.weight.shape):
            rows, columns = matrix.weight.shape
            raise UserError(
                f"--dtype {kind} takes {BLOCKS[kind]} numbers at a time, and {name} is {rows} x {columns}: export with "
                "--dtype fp8, or train with sizes that are multiples of 16"
            )
        library.quantization.quantize_(matrix, rounding(library, kind, getattr(matrix, "unit_axis", 1)))
    described = TorchAoConfig(rounding(library, kind), modules_to_not_convert=[READOUT])
    model.config.quantization_config = described
    model.hf_quantizer = AutoHfQuantizer.from_config(described, pre_quantized=True)


def rounding(library: Any, kind: str, axis: int = 1) -> Any:
    """What torchao calls the format `kind`; axis: along which the numbers lie that share a scale (fp8)."""
    if kind == "nvfp4":
        return library.prototype.mx_formats.NVFP4WeightOnlyConfig()
    one = library.quantization.PerRow(-1 if axis == 1 else 0)
    return library.quantization.Float8WeightOnlyConfig(granularity=one, set_inductor_config=False)
