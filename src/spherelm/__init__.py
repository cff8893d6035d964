"""spherelm trains language models on the hypersphere: the normalized Transformer (nGPT) and its GPT baseline.

The names below are the public API. They are imported when first used, so that `import spherelm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spherelm.layers.linear import departure, retract
    from spherelm.models import (
        GPT,
        NGPT,
        EncDec,
        EncDecConfig,
        GPTConfig,
        Hybrid,
        HybridConfig,
        NEncDec,
        NEncDecConfig,
        NGPTConfig,
        NHybrid,
        NHybridConfig,
        build,
    )
    from spherelm.models.generate import generate
    from spherelm.optim import OptimConfig, attach_retraction, build_optimizer
    from spherelm.train.checkpoint import load_model

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "NGPT",
    "EncDec",
    "EncDecConfig",
    "GPTConfig",
    "Hybrid",
    "HybridConfig",
    "NEncDec",
    "NEncDecConfig",
    "NGPTConfig",
    "NHybrid",
    "NHybridConfig",
    "OptimConfig",
    "attach_retraction",
    "build",
    "build_optimizer",
    "departure",
    "generate",
    "load_model",
    "retract",
]

_HOMES = {
    "EncDec": "spherelm.models",
    "EncDecConfig": "spherelm.models",
    "GPT": "spherelm.models",
    "Hybrid": "spherelm.models",
    "HybridConfig": "spherelm.models",
    "NEncDec": "spherelm.models",
    "NEncDecConfig": "spherelm.models",
    "NGPT": "spherelm.models",
    "NHybrid": "spherelm.models",
    "NHybridConfig": "spherelm.models",
    "GPTConfig": "spherelm.models",
    "NGPTConfig": "spherelm.models",
    "OptimConfig": "spherelm.optim",
    "attach_retraction": "spherelm.optim",
    "build": "spherelm.models",
    "build_optimizer": "spherelm.optim",
    "departure": "spherelm.layers.linear",
    "generate": "spherelm.models.generate",
    "load_model": "spherelm.train.checkpoint",
    "retract": "spherelm.layers.linear",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'spherelm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
