"""The ablations of the nGPT paper's Tables 4 to 6, each as the fields of an `NGPTConfig`
that differ from the paper's.
"""

from __future__ import annotations

import math
from typing import Any


def _starts(name: str, inits: tuple[str, ...], scales: tuple[str, ...]) -> dict[str, tuple[str, str, str]]:
    return {f"{name}-from-{init}-at-{scale}": (name, init, scale) for init in inits for scale in scales}


STARTS = {
    **_starts("s_qk", ("1", "0.33", "0.05"), ("rsqrt", "1")),
    **_starts("s_uv", ("1", "rsqrt"), ("1", "rsqrt")),
    **_starts("s_z", ("1", "sqrt"), ("rsqrt", "1")),
}
"""Table 4: which scale, its init, and what it is stored at, in words:
rsqrt is 1/sqrt(d_model), sqrt is sqrt(d_model).
"""

FIELDS: dict[str, dict[str, Any]] = {
    **{f"{name}-{form}": {f"{name}.form": form} for name in ("s_qk", "s_z", "alpha") for form in ("scalar", "fixed")},
    **{f"s_uv-{form}": {"s_u.form": form, "s_v.form": form} for form in ("scalar", "fixed")},
    "no-qk-norm": {"variant.qk_norm": False},
    "alpha-free": {"variant.alpha_sign": "free"},
    "riemannian": {"variant.step": "riemannian"},
}
"""Tables 5 and 6: what differs from the base."""

BASES = ("s_qk-from-1-at-rsqrt", "s_uv-from-1-at-1", "s_z-from-1-at-rsqrt")
"""The rows of Table 4 that repeat the paper's own initial values."""

NAMES = tuple(name for name in (*STARTS, *FIELDS) if name not in BASES)
"""All but those, in the paper's order."""


def start_fields(name: str, init: str, scale: str, d_model: int) -> dict[str, float]:
    """The fields of an `NGPTConfig`, by path, that an entry of `STARTS` stands for."""
    numbers = {"rsqrt": 1 / math.sqrt(d_model), "sqrt": math.sqrt(d_model)}
    values = {"init": numbers.get(init) or float(init), "scale": numbers.get(scale) or float(scale)}
    names = ("s_u", "s_v") if name == "s_uv" else (name,)
    return {f"{one}.{what}": value for one in names for what, value in values.items()}


def fields_of(name: str, d_model: int) -> dict[str, Any]:
    """The fields that the ablation `name` changes in a model with `d_model` channels."""
    return start_fields(*STARTS[name], d_model) if name in STARTS else FIELDS[name]


def in_words(name: str) -> str:
    """The change that the ablation `name` makes, as text."""
    if name in STARTS:
        scale, init, stored = STARTS[name]
        return f"{scale} from {init}, stored at {stored}"
    return ", ".join(f"{field}={value}" for field, value in FIELDS[name].items())
