from __future__ import annotations

import math

import paper
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spherelm.layers.rope import (
    ROPES,
    MakeTable,
    interpolated,
    nvidia_table,
    rotary_table,
    rotate,
    yarn,
    yarn_temperature,
)
from spherelm.sphere import norm


@pytest.mark.parametrize("d_k", [2, 8, 10])
@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_rotation_is_the_papers(d_k: int, base: float) -> None:
    x = torch.randn(2, 3, 7, d_k, dtype=torch.float64)
    ours = rotate(x, rotary_table(torch.arange(7.0, dtype=torch.float64), d_k, base))
    torch.testing.assert_close(ours, paper.rope(x, base), rtol=1e-13, atol=1e-13)


def test_channel_i_is_paired_with_channel_i_plus_half() -> None:
    x = torch.zeros(1, 1, 2, 6)
    x[..., 1] = 1
    moved = rotate(x, rotary_table(torch.tensor([0.0, 1.0]), 6, 10000.0))[0, 0, 1]
    assert moved.nonzero().flatten().tolist() == [1, 4]


def test_lengths_do_not_change_and_position_zero_is_left_alone() -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    moved = rotate(x, rotary_table(torch.arange(9.0, dtype=torch.float64), 8, 10000.0))
    torch.testing.assert_close(moved.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    assert torch.equal(moved[:, :, 0], x[:, :, 0])


def test_positions_may_start_anywhere_and_differ_by_sequence() -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    whole = rotate(x, rotary_table(torch.arange(9.0, dtype=torch.float64), 8, 10000.0))
    tail = rotate(x[:, :, 4:], rotary_table(torch.arange(4.0, 9.0, dtype=torch.float64), 8, 10000.0))
    torch.testing.assert_close(tail, whole[:, :, 4:], rtol=1e-14, atol=1e-14)
    starts = torch.stack([torch.arange(0.0, 5.0), torch.arange(4.0, 9.0)]).double().unsqueeze(1)
    mixed = rotate(torch.stack([x[0, :, :5], x[1, :, 4:]]), rotary_table(starts, 8, 10000.0))
    torch.testing.assert_close(mixed, torch.stack([whole[0, :, :5], whole[1, :, 4:]]), rtol=1e-14, atol=1e-14)


def test_bfloat16_is_rotated_in_the_tables_precision() -> None:
    x = torch.randn(1, 2, 5, 8).bfloat16()
    table = rotary_table(torch.arange(5.0), 8, 10000.0)
    moved = rotate(x, table)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, rotate(x.float(), table).bfloat16())


def turns(make: MakeTable, d_k: int, base: float) -> torch.Tensor:
    """Radians a position of each pair: the angles at position 1, which are all at most 1."""
    cos, sin = make(torch.tensor([1.0], dtype=torch.float64), d_k, base)
    return torch.atan2(sin, cos)[0]


def theirs(kind: str, d_k: int, base: float, factor: float, trained: int) -> tuple[torch.Tensor, float]:
    """The frequencies that transformers computes, and by how much it multiplies cosines and sines."""
    scaling = {"rope_type": kind, "rope_theta": base, "factor": factor, "original_max_position_embeddings": trained}
    config = LlamaConfig(
        hidden_size=2 * d_k,
        num_attention_heads=2,
        max_position_embeddings=int(trained * factor),
        rope_parameters=scaling,
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.double(), float(scale)


@pytest.mark.parametrize(("d_k", "base", "trained"), [(64, 10000.0, 256), (128, 10000.0, 4096), (32, 500000.0, 1024)])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0, 32.0])
def test_frequencies_are_those_of_transformers(d_k: int, base: float, trained: int, factor: float) -> None:
    """An independent implementation of YaRN and of interpolated positions."""
    frequencies, scale = theirs("yarn", d_k, base, factor, trained)
    torch.testing.assert_close(turns(yarn(factor, trained), d_k, base), frequencies, rtol=2e-6, atol=0)
    assert yarn_temperature(factor) == pytest.approx(scale**2, rel=1e-12)
    frequencies, scale = theirs("linear", d_k, base, factor, trained)
    torch.testing.assert_close(turns(interpolated(rotary_table, factor), d_k, base), frequencies, rtol=2e-6, atol=0)
    assert scale == 1


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    """At factor 4 and 256 positions: 32 turns or more are kept, less than one is slowed by the whole factor."""
    before, after = turns(rotary_table, 64, 10000.0), turns(yarn(4, 256), 64, 10000.0)
    per_window = before * 256 / (2 * math.pi)
    assert torch.equal(after[per_window >= 32], before[per_window >= 32])
    slow = per_window < 0.5
    torch.testing.assert_close(after[slow], before[slow] / 4, rtol=1e-12, atol=0)
    assert ((after <= before) & (after >= before / 4 * (1 - 1e-12))).all()


@pytest.mark.parametrize("table", [rotary_table, nvidia_table])
def test_interpolated_positions_are_the_trained_ones(table: MakeTable) -> None:
    """Four times as many positions lie where those of training lay; every fourth is one of them."""
    trained = table(torch.arange(8.0, dtype=torch.float64), 8, 10000.0)
    stretched = interpolated(table, 4)(torch.arange(32.0, dtype=torch.float64), 8, 10000.0)
    for one, other in zip(trained, stretched, strict=True):
        assert torch.equal(one, other[::4])


def test_nvidias_formula_of_directions_is_the_direction_of_its_vectors() -> None:
    """Normalizing first changes nothing that is left when normalizing last: the formula is linear."""
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    for rope in ROPES.values():
        table = rope.table(torch.arange(5.0, dtype=torch.float64), 8, 10000.0)
        wanted = norm(rope.rotation(x, table))
        for given in (x, norm(x)):
            torch.testing.assert_close(rope.unit_rotation(given, table), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("by_sequence", [False, True])
def test_gradients_of_the_rotated_directions_are_those_of_the_two_parts(name: str, by_sequence: bool) -> None:
    """Against autograd's own through a division and the rotation; positions alike in all sequences, or not."""
    positions = torch.arange(10.0, dtype=torch.float64).view(2, 1, 5) if by_sequence else torch.arange(5.0).double()
    rope, x = ROPES[name], torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    table = rope.table(positions, 8, 10000.0)
    rotated = rope.rotation(x, table)
    wanted = rotated / rotated.square().sum(-1, keepdim=True).sqrt()
    direction = torch.randn_like(x)
    gradients = [torch.autograd.grad((out * direction).sum(), x)[0] for out in (rope.unit_rotation(x, table), wanted)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-13)
