from __future__ import annotations

from typing import Any

import paper
import pytest
import torch
from torch import Tensor

from spherelm.layers.attention import Attention, UnitAttention
from spherelm.layers.cache import KVCache, LayerCache
from spherelm.layers.linear import Scale, retract
from spherelm.layers.rope import RotaryTable, rotary_table

D, HEADS = 24, 6


def table(start: int, end: int) -> RotaryTable:
    return rotary_table(torch.arange(float(start), float(end), dtype=torch.float64), D // HEADS, 10000.0)


def layer(kind: str, n_kv_heads: int) -> tuple[Attention | UnitAttention, Any, paper.Params, paper.Shape]:
    """A layer, the oracle's function for it, its parameters under the oracle's names, and the shape."""
    shape = paper.Shape(1, D, HEADS, n_kv_heads, inner_norm=kind == "inner norm")
    module: Attention | UnitAttention
    if kind == "plain":
        module = Attention(D, HEADS, n_kv_heads).double()
    else:
        s_qk = Scale((HEADS, D // HEADS), 1.0, D**-0.5)
        module = UnitAttention(D, HEADS, n_kv_heads, s_qk, inner_norm=shape.inner_norm).double()
        retract(module)
        with torch.no_grad():
            module.s_qk.value.mul_(1 + 0.5 * torch.randn_like(module.s_qk.value))
    return module, paper.gpt_attention if kind == "plain" else paper.attention, dict(module.named_parameters()), shape


def hidden(kind: str) -> Tensor:
    h = torch.randn(2, 7, D, dtype=torch.float64)
    return (h if kind == "plain" else paper.norm(h)).requires_grad_()


@pytest.mark.row("Attention")
@pytest.mark.parametrize("n_kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("kind", ["plain", "unit", "inner norm"])
def test_attention_and_its_gradients_are_the_papers(kind: str, n_kv_heads: int, agree: Any) -> None:
    module, oracle, p, shape = layer(kind, n_kv_heads)
    h = hidden(kind)
    agree(module(h, table(0, 7)), oracle(p, "", shape, h), [h, *p.values()])


@pytest.mark.parametrize("kind", ["plain", "unit"])
def test_a_mask_says_which_keys_are_seen(kind: str) -> None:
    module, _, _, _ = layer(kind, 3)
    h = hidden(kind)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(module(h, table(0, 7), causal), module(h, table(0, 7)), rtol=1e-12, atol=1e-13)
    own_document = causal.clone()
    own_document[3:, :3] = False
    seen = module(h, table(0, 7), own_document)
    torch.testing.assert_close(seen[:, 3:], module(h[:, 3:], table(3, 7)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "unit"])
def test_keys_and_values_of_past_tokens_are_reused(kind: str) -> None:
    module, _, _, _ = layer(kind, 2)
    h, cache = hidden(kind), LayerCache()
    whole = module(h, table(0, 7))
    assert cache.length == 0
    pieces = [module(h[:, :4], table(0, 4), None, cache)]
    for i in range(4, 7):
        everything = torch.ones(1, i + 1, dtype=torch.bool)
        pieces.append(module(h[:, i : i + 1], table(i, i + 1), everything, cache))
        assert cache.length == i + 1
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-11, atol=1e-12)


def test_a_new_cache_is_empty_in_every_layer() -> None:
    cache = KVCache(3)
    assert cache.length == 0
    assert len(cache.layers) == 3


def test_attention_on_the_sphere_does_not_depend_on_the_lengths_of_q_and_k() -> None:
    module, _, _, _ = layer("unit", 6)
    h = hidden("unit")
    before = module(h, table(0, 7))
    with torch.no_grad():
        module.q.weight.mul_(3)
        module.k.weight.mul_(5)
    torch.testing.assert_close(module(h, table(0, 7)), before, rtol=1e-12, atol=1e-13)
