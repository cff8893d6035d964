"""The names that the oracle (paper.py, paper_hybrid.py) has for the parameters of a model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")

TOP = {"head.linear.weight": "head.weight", "head.norm.weight": "norm.weight", "head.s_z.value": "s_z.value"}
PARTS = {"attention": "attention", "cross_attention": "cross", "mlp": "mlp", "mixer": "mamba", "experts": "experts"}
LETTERS = {"attention": "a", "cross_attention": "c", "mlp": "m"}
BLOCK = re.compile(r"(.*?blocks\.\d+\.)(\w+)\.(part|alpha|norm)\.(.*)")


def oracle_names(ours: Iterable[str]) -> dict[str, str]:
    """Each of our names -> the oracle's."""
    names = list(ours)
    parts: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if match := BLOCK.fullmatch(name):
            parts[match[1]].add(match[2])
    return {name: _oracle_name(name, parts) for name in names}


def _oracle_name(name: str, parts: dict[str, set[str]]) -> str:
    match = BLOCK.fullmatch(name)
    if match is None:
        return TOP.get(name, name)
    block, sublayer, kind, rest = match.groups()
    if kind == "part":
        return f"{block}{PARTS[sublayer]}.{rest}"
    return f"{block}{kind}.{rest}" if len(parts[block]) == 1 else f"{block}{kind}_{LETTERS[sublayer]}.{rest}"


def by_oracle_names(values: Mapping[str, T]) -> dict[str, T]:
    """`values`, keyed by our names, keyed by the oracle's."""
    names = oracle_names(values)
    return {names[name]: value for name, value in values.items()}


def oracle_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` by the oracle's names."""
    return iter(by_oracle_names(dict(model.named_parameters())).items())
