"""spherelm trains language models on the hypersphere: the normalized Transformer (nGPT) and its GPT baseline.

The names below are the public API. They are imported when first used, so that `import spherelm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spherelm.generation.generate import generate
    from spherelm.layers.linear import Scale, UnitEmbedding, UnitLinear, departure, retract
    from spherelm.models import (
        GPT,
        NGPT,
        DecoderArch,
        EncDecArch,
        EncoderArch,
        GPTConfig,
        NGPTConfig,
        ScaleSpec,
        Variant,
        build,
    )
    from spherelm.optim import OptimConfig, attach_retraction, build_optimizer
    from spherelm.recipes import recipe
    from spherelm.runs.loading import load_model

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "NGPT",
    "DecoderArch",
    "EncDecArch",
    "EncoderArch",
    "GPTConfig",
    "NGPTConfig",
    "OptimConfig",
    "Scale",
    "ScaleSpec",
    "UnitEmbedding",
    "UnitLinear",
    "Variant",
    "attach_retraction",
    "build",
    "build_optimizer",
    "departure",
    "generate",
    "load_model",
    "recipe",
    "retract",
]

_HOMES = {
    **dict.fromkeys(("GPT", "NGPT", "GPTConfig", "NGPTConfig", "ScaleSpec", "Variant", "build"), "spherelm.models"),
    **dict.fromkeys(("DecoderArch", "EncDecArch", "EncoderArch"), "spherelm.models"),
    **dict.fromkeys(("Scale", "UnitEmbedding", "UnitLinear", "departure", "retract"), "spherelm.layers.linear"),
    **dict.fromkeys(("OptimConfig", "attach_retraction", "build_optimizer"), "spherelm.optim"),
    "generate": "spherelm.generation.generate",
    "load_model": "spherelm.runs.loading",
    "recipe": "spherelm.recipes",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'spherelm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
