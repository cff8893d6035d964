"""A short trial of a run's matrix products, to find which number format is faster on this machine.

A processor's flags say what it can do and nothing about how fast: with AVX512-BF16 and without AMX float32
is twice as fast.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

LARGEST_PRODUCT = 3e8
"""Floating point operations of a product; of a larger one fewer rows are taken."""

DECIDED = 4.0
"""Where one format is so many times slower, the larger products are not tried:
emulated, they take a hundred times as long.
"""

WORTH_ROUNDING = 0.9
"""In what part of float32's time bfloat16 has to do the products, to be taken."""

Shapes = Counter[tuple[int, int]]
"""How many matrices there are of [out_features, in_features]."""


def matrices(model: nn.Module) -> Shapes:
    """Those that the tokens of a step are multiplied by, each once even if modules share it;
    embeddings only look rows up.
    """
    weights: dict[int, Tensor] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and not isinstance(module, nn.Embedding):
            weights[id(weight)] = weight
    return Counter((w.shape[0], w.shape[1]) for w in weights.values() if w.ndim == 2)


class Products:
    """The products of one matrix in a step, forward and backward, on random numbers."""

    def __init__(self, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
        out_features, in_features = shape
        rows = max(1, min(rows, int(LARGEST_PRODUCT / (2 * out_features * in_features))))
        self.weight = torch.full(shape, 0.5, dtype=dtype)
        self.x = torch.full((rows, in_features), 0.5, dtype=dtype)
        self.grad = torch.full((rows, out_features), 0.5, dtype=dtype)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and the gradients of the input and of the matrix."""
        return self.x @ self.weight.T, self.grad @ self.weight, self.grad.T @ self.x

    def seconds(self) -> float:
        """Of one call."""
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


def faster_dtype(shapes: Shapes, rows: int, repeats: int = 3) -> torch.dtype:
    """Whichever of float32 and bfloat16 does the products of `shapes` with `rows` tokens faster, here and now."""
    formats = (torch.float32, torch.bfloat16)
    totals = dict.fromkeys(formats, 0.0)
    for shape in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        products = {dtype: Products(shape, rows, dtype) for dtype in formats}
        taken = {dtype: [products[dtype].seconds()] for dtype in formats}  # the first call prepares
        for _ in range(repeats):
            for dtype in formats:
                taken[dtype].append(products[dtype].seconds())
        for dtype in formats:
            totals[dtype] += shapes[shape] * min(taken[dtype][1:])
        if max(totals.values()) > DECIDED * min(totals.values()):
            break
    return torch.bfloat16 if totals[torch.bfloat16] < WORTH_ROUNDING * totals[torch.float32] else torch.float32


def known_dtype(shapes: Shapes, rows: int) -> torch.dtype:
    """As `faster_dtype`, measured once a machine, version of torch and set of shapes:
    kept in the user's cache directory.
    """
    key = hashlib.sha256(repr((processor(), torch.__version__, rows, sorted(shapes.items()))).encode()).hexdigest()[:16]
    path = cache_directory() / "dtypes.json"
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    if known.get(key) not in ("float32", "bfloat16"):
        known[key] = str(faster_dtype(shapes, rows)).removeprefix("torch.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}")
            part.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError:  # no home that can be written to: measure again next time
            pass
    found: torch.dtype = getattr(torch, known[key])
    return found


def cache_directory() -> Path:
    """Where the user's programs keep what they can find out again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spherelm"


def processor() -> str:
    """The processor's name and what it says that it can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
