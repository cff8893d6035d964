"""Names of parameters as version 0.1.0 wrote them, and what they are called today: the one table that reads older files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

TOP = {"head.weight": "head.linear.weight", "norm.weight": "head.norm.weight", "s_z.value": "head.s_z.value"}
SUBLAYERS = {"a": "attention", "c": "cross_attention", "m": "mlp"}
PARTS = {"attention": "attention", "cross": "cross_attention", "mlp": "mlp", "mamba": "mixer", "experts": "experts"}
BLOCK = re.compile(r"(?P<block>(?:.*\.)?blocks\.\d+\.)(?P<rest>.+)")


def is_old(names: Iterable[str]) -> bool:
    """Whether these are the names of a state dict of version 0.1.0, with or without a prefix such as "model."."""
    return not any(".part." in name for name in names)


def renames(names: Iterable[str]) -> dict[str, str]:
    """For each name of version 0.1.0 the name of today."""
    names = list(names)
    only: dict[str, str] = {}
    for name in names:
        match = BLOCK.fullmatch(name)
        if match and match["rest"].split(".")[0] in PARTS:
            only[match["block"]] = PARTS[match["rest"].split(".")[0]]  # of a block with one part, that part
    return {name: _renamed(name, only) for name in names}


def _renamed(name: str, only: Mapping[str, str]) -> str:
    match = BLOCK.fullmatch(name)
    if match is None:
        for old, new in TOP.items():
            if name == old or (name.endswith(f".{old}") and not name.endswith(f"encoder.{old}")):
                return name.removesuffix(old) + new
        return name
    block, (first, _, rest) = match["block"], match["rest"].partition(".")
    if first in PARTS:
        return f"{block}{PARTS[first]}.part.{rest}"
    kind, _, letter = first.partition("_")  # norm_a, alpha_m; of a block with one part norm, alpha
    sublayer = SUBLAYERS.get(letter) if letter else only.get(block)
    return f"{block}{sublayer}.{kind}.{rest}" if sublayer else name


def today(state: Mapping[str, T]) -> dict[str, T]:
    """`state`, of any version, by the names of today."""
    new = renames(state) if is_old(state) else {name: name for name in state}
    return {new[name]: value for name, value in state.items()}
